"""PEFT's layers on weights in FP8: one call of `lora_linear` each, and PEFT's own where told."""

import copy

import peft
import pytest
import torch
from fp8 import dense_of, fp8_linear
from peft_checks import fused_calls, input_of, passes, swap_quietly
from tolerance import relative_error
from torch import nn

from deltadiff import DeltaLoRA, export_peft, quantise_, swap_, unswap_
from deltadiff.errors import ArgumentTypeError, SwapError

F32, BF16 = torch.float32, torch.bfloat16
NAME = "base_model.model.first"
FP8 = [f"{NAME}.base_layer.{name}" for name in ("weight", "weight_scale_inv")]


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).tanh())


def ours():
    """Of deltadiff's own layers, which PEFT's own forward pass can call too."""
    torch.manual_seed(0)
    model = Two(nn.Linear(64, 130), nn.Linear(130, 64, bias=False))
    quantise_(model, "fp8")
    return model


def of_transformers():
    return Two(fp8_linear(130, 64), fp8_linear(64, 130, None, bias=False))


def dense():
    """The model that the layers of `of_transformers` stand for."""
    model = of_transformers()
    return Two(dense_of(model.first), dense_of(model.second))


def adapted(base, **options):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]} | options
    torch.manual_seed(1)
    return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **config))


def assert_same(found, expected, limit=2e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value.double()) < limit, name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"first": 7}}])
def test_the_results_of_peft_by_one_call_a_layer(options):
    model, x = adapted(ours(), **options), input_of()
    expected, state = passes(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    report = swap_(model)
    assert {row.path for row in report.rows} == {"cpp"}
    assert "FP8 weight: decoded in each pass" in str(report)
    with fused_calls(model) as calls:
        assert_same(passes(model, x), expected)
    assert calls.total() == len(calls) == 2
    assert state.keys() == model.state_dict().keys()
    for dtype in (BF16, F32):  # PEFT's product is in the dtype of the adapters then
        with torch.autocast("cpu", BF16, enabled=dtype == F32), fused_calls(model) as calls:
            y = model(x.to(dtype))
        assert calls.total() == 2 and relative_error(y, expected["y"].double()) < 0.03
    model.to(BF16).to(F32)  # our layer keeps its weight and scales
    assert all(torch.equal(model.state_dict()[n].float(), state[n].float()) for n in FP8)
    unswap_(model)
    model.load_state_dict(state)
    assert_same(passes(model, x), expected)


def test_layers_of_transformers():
    """Their own product needs a GPU and a kernel from the net, so the truth is a dense model."""
    model, truth, x = adapted(of_transformers()), adapted(dense()), input_of()
    truth.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, False)
    expected = passes(truth.double(), x.double())
    assert "FP8Linear itself would quantise the activations, too" in str(swap_(model))
    with fused_calls(model) as calls:
        assert_same(passes(model, x), expected)
    assert calls.total() == 2
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    for _ in range(3):
        passes(model, x)
        optimizer.step()
    y, fresh = model(x), adapted(of_transformers())
    with pytest.warns(UserWarning, match="export_peft"):
        state = model.state_dict()
    swap_(fresh)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), y) and torch.equal(copy.deepcopy(model)(x), y)


def test_what_cannot_be():
    model, x = adapted(of_transformers()), input_of()
    swap_(model)
    with pytest.raises(ArgumentTypeError, match="w_update='factored'"):
        DeltaLoRA(model, update_ratio=0.5, w_update="inplace")
    y = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SwapError, match="a weight in FP8, to which PEFT cannot add.*export_pe"):
            merge()
    assert torch.equal(model(x), y)
    model.to(BF16)  # which transformers' layer takes as if it held numbers
    with pytest.raises(SwapError, match="weight: got torch.bfloat16 beside scales of FP8"):
        model(x.to(BF16))


def test_merging_changes_no_other_layer_first():
    first, second = nn.Linear(64, 130), fp8_linear(64, 130)
    model = adapted(Two(first, second))
    swap_(model)
    before = first.weight.detach().clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SwapError, match="FP8"):
            merge()
        assert torch.equal(first.weight, before) and not model.get_submodule(NAME).merged
    model.add_adapter("dense", peft.LoraConfig(r=2, target_modules=["first"]))
    model.set_adapter("dense")
    model.merge_adapter()
    assert model.get_submodule(NAME).merged


def test_an_exported_adapter(tmp_path):
    model, x = adapted(ours()), input_of()
    swap_(model)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    for _ in range(3):
        passes(model, x)
        optimizer.step()
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(ours(), tmp_path)
    assert relative_error(theirs(x), model(x).detach().double()) < 2e-6


CHANGES = {
    "hooks on it": lambda base: base.register_forward_hook(lambda *_: None),
    "a forward pass that was put on it": lambda base: setattr(base, "forward", base.forward),
    "got shape": lambda base: setattr(base, "block_size", (64, 64)),
}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("told", list(CHANGES)[:2])
def test_pefts_own_forward_pass(told, later):
    model, x = adapted(ours(), target_modules=["first"]), input_of()
    expected = passes(model, x)
    if later:
        swap_(model)
        passes(model, x)
    CHANGES[told](model.get_submodule(NAME).base_layer)
    report = swap_quietly(model)
    assert report.rows[0].path == "peft" and told in report.rows[0].reason
    with fused_calls(model) as calls:
        found = passes(model, x)
    assert not calls and all(torch.equal(found[name], value) for name, value in expected.items())


def test_scales_that_do_not_fit_are_told():
    model = adapted(of_transformers(), target_modules=["first"])
    CHANGES["got shape"](model.get_submodule(NAME).base_layer)
    report = swap_quietly(model)
    assert report.rows[0].path == "peft" and "scale: got shape" in report.rows[0].reason
