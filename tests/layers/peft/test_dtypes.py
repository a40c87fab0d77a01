"""Bases, adapters, inputs and autocast of all dtypes: as near to float64 as PEFT is, and fast."""

import peft
import pytest
import torch
from peft_cases import shake
from peft_checks import flat, fused_calls, run, swap_quietly
from peft_models import input_of, make_model, output_of
from tolerance import assert_close_to_truth

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TARGETS = {"mlp": ["lin0", "lin1"], "conv1d stack": ["square", "wide"]}


def build(model, base, autocast_adapter_dtype=True, adapters=None):
    """PEFT's model over a base of this dtype; by default PEFT makes its adapters float32."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS[model], fan_in_fan_out=True)
    model = make_model(model).to(base)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, p in model.named_parameters():
        p.data = p.data.to(adapters) if adapters is not None and "lora_" in name else p.data
    return shake(model)


def compare(model, base, x, fused, context=None, **options):
    """Runs of the swapped model and of PEFT's beside one in float64 with the same numbers."""
    plain, swapped, truth = (build(model, base, **options) for _ in range(3))
    swap_quietly(swapped)

    def output(model, x):
        if context is None or model is truth:
            return output_of(model, x)
        with context:
            return output_of(model, x)

    with fused_calls(swapped) as calls:
        found = run(swapped, x, output)
    assert calls.total() == fused
    eager, truth = run(plain, x, output), run(truth.double(), x.double(), output)
    assert found[0].dtype == eager[0].dtype and list(found[1]) == list(eager[1])
    assert all(g.dtype == eager[1][n].dtype for n, g in found[1].items())
    assert_close_to_truth(found[0], eager[0], truth[0], 2)
    assert_close_to_truth(*(flat(grads) for grads in (found[1], eager[1], truth[1])), 3, F32)


def x_of(model, dtype):
    return input_of(model, F64).to(dtype)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("model", TARGETS)
class TestDtypes:
    @pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
    @pytest.mark.parametrize("float32_adapters", [True, False])
    def test_adapters_of_float32_or_of_the_dtype_of_the_base(self, model, dtype, float32_adapters):
        options = {"autocast_adapter_dtype": float32_adapters}
        compare(model, dtype, x_of(model, dtype), 2, **options)

    @pytest.mark.parametrize("base", [F32, None], ids=["float32 base", "half base"])
    @pytest.mark.parametrize("given", [F32, None], ids=["float32 input", "half input"])
    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_autocast(self, model, dtype, given, base):
        x = x_of(model, given or dtype)
        context = torch.autocast("cpu", dtype=dtype)
        compare(model, base or dtype, x, 2, context)

    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_autocast_leaves_float64(self, model, dtype):
        context = torch.autocast("cpu", dtype=dtype)
        compare(model, F64, x_of(model, F64), 2, context)

    @pytest.mark.parametrize("adapters", [BF16, F16], ids=str)
    @pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
    def test_half_adapters_of_a_float32_base_under_autocast(self, model, dtype, adapters):
        """They are fast in the dtype of autocast; PEFT's own forward pass runs another."""
        context, fused = torch.autocast("cpu", dtype=dtype), 2 if dtype == adapters else 0
        compare(model, F32, x_of(model, F32), fused, context, adapters=adapters)


@pytest.mark.parametrize(("base", "given"), [(BF16, F32), (F32, BF16), (F32, F64), (F16, BF16)])
def test_an_input_that_peft_refuses_is_refused_in_its_words(base, given):
    plain, swapped = build("mlp", base), build("mlp", base)
    swap_quietly(swapped)
    errors = []
    for model in (plain, swapped):
        with pytest.raises(RuntimeError) as error:
            output_of(model, x_of("mlp", given))
        errors.append(str(error.value))
    assert errors[0] == errors[1]
