"""PEFT's other tuners: `swap_` refuses their models unchanged, and leaves their layers beside LoRA.

`peft_tuners` lists them all; a tuner that PEFT has and the list has not fails a test.
"""

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from peft_cases import shake
from peft_checks import assert_equal_runs, facts_of, fused_calls, layers_named, run, swap_quietly
from peft_models import input_of, make_model, output_of
from peft_tuners import LIN0, ON_OTHER_LAYERS, TUNERS, build_tuner

from deltadiff import swap_
from deltadiff.errors import SwapError

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about these configurations
OTHERS = [*TUNERS.items(), *ON_OTHER_LAYERS]


def test_every_tuner_of_peft_is_in_the_table():
    kinds = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - {"LORA"}
    words = "add the smallest arguments that make it run to TUNERS in tests/support/peft_tuners.py"
    assert kinds == TUNERS.keys(), f"{words}: {sorted(kinds ^ TUNERS.keys())}"


@pytest.mark.parametrize(("kind", "tuner"), OTHERS, ids=[f"{k}-{t.model}" for k, t in OTHERS])
def test_a_model_without_lora_is_refused_unchanged(kind, tuner, tmp_path):
    model, x = build_tuner(kind, tuner, tmp_path), input_of(tuner.model, torch.float32)
    y, grads = run(model, x, output_of, **tuner.arguments)
    grads = {n: g.clone() for n, g in grads.items()}
    before, kinds = facts_of(model), [type(m) for m in model.modules()]
    with pytest.raises(SwapError, match="without a layer to make faster"):
        swap_(model)
    assert facts_of(model) == before and [type(m) for m in model.modules()] == kinds
    z, others = run(model, x, output_of, **tuner.arguments)
    assert torch.equal(y, z) and y.isfinite().all()
    assert grads and grads.keys() == others.keys()
    assert all(torch.equal(g, others[n]) for n, g in grads.items())


def test_the_error_names_the_tuner(tmp_path):
    with pytest.raises(SwapError, match="PEFT's xlora.layer.XLoraLinearLayer, which holds its"):
        swap_(build_tuner("XLORA", TUNERS["XLORA"], tmp_path))
    with pytest.raises(SwapError, match=r"PEFT's loha\.layer\.Linear"):
        swap_(build_tuner("LOHA", TUNERS["LOHA"], tmp_path))


# ------------------------------------------------------------------- several in one model

BESIDE = sorted(kind.value for kind in COMPATIBLE_TUNER_TYPES if kind.value != "LORA")


def mixed(first: tuple[str, list[str]], second: tuple[str, list[str]]):
    """PEFT's mixed model with two active adapters, each of a kind on some layers."""
    model = make_model("mlp")
    for i, (kind, targets) in enumerate((first, second)):
        options = dict(TUNERS[kind].options) if kind != "LORA" else {"r": 2}
        options |= {"target_modules": targets, "inference_mode": kind == "ADALORA"}
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**options)
        if i:
            model.add_adapter("second", config)
        else:
            model = peft.get_peft_model(model, config, adapter_name="first", mixed=True)
    model.set_adapter(["first", "second"])
    return shake(model.double())


def compare_mixed(first, second):
    """The names of the layers that were fused, and the report."""
    plain, swapped, x = mixed(first, second), mixed(first, second), input_of("mlp")
    before = facts_of(swapped)
    report = swap_quietly(swapped)
    assert facts_of(swapped) == before
    with fused_calls(swapped) as calls:
        found = run(swapped, x, output_of)
    assert_equal_runs(run(plain, x, output_of), found)
    paths = layers_named(swapped, report)
    assert {name for name, path in paths.items() if path != "peft"} == set(calls)
    return [name.removeprefix("base_model.model.") for name in calls], str(report)


@pytest.mark.parametrize("other", BESIDE)
def test_lora_beside_another_tuner_is_fast(other):
    fused, report = compare_mixed(("LORA", ["lin0"]), (other, ["lin1"]))
    assert fused == ["lin0"] and "1 of PEFT's layers run its own forward pass" in report


@pytest.mark.parametrize("other", BESIDE)
def test_lora_around_another_tuners_layer_runs_pefts_forward(other):
    fused, report = compare_mixed((other, LIN0["target_modules"]), ("LORA", ["lin0", "lin1"]))
    assert fused == ["lin1"] and f"its base layer is PEFT's {other.lower()}.layer." in report


@pytest.mark.parametrize("other", [kind for kind in BESIDE if kind != "SHIRA"])  # it refuses
def test_lora_inside_of_another_tuners_layer_is_fast(other):
    fused, _ = compare_mixed(("LORA", ["lin0", "lin1"]), (other, ["lin0"]))
    assert fused == ["lin0.base_layer", "lin1"]
