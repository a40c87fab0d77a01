"""A swapped model computes what PEFT's model computes, for each family of the table."""

from functools import cache

import pytest
import torch
from families import FAMILIES
from family_runs import (
    all_linear,
    fused_layers,
    name_ends,
    outputs,
    randomise,
    run,
    swapped,
    why_not_fused,
    with_peft,
)
from tolerance import assert_close_to_truth
from torch.testing import assert_close

from deltadiff import swap_

ROUNDINGS = {"rtol": 1e-10, "atol": 1e-12}  # of runs in float64
FACTOR = 5  # Between two right orders of summation, errors of such small models differ threefold.


def assert_equal(found, expected):
    assert_close(found.outputs, expected.outputs, **ROUNDINGS)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        mine = found.gradients[name]
        assert (mine is None) == (gradient is None), name
        if mine is not None:
            assert_close(mine, gradient, **ROUNDINGS)


@cache
def pefts_run(family, training):
    return run(with_peft(family), family.inputs(), training)


def test_outputs_and_gradients_are_pefts(family):
    model, inputs = swapped(family, random=False), family.inputs()
    base = outputs(family.build(), inputs)
    assert_close(outputs(model, inputs), base, **ROUNDINGS)  # because B is 0
    randomise(model)
    assert (outputs(model, inputs) - base).norm() > 1e-3 * base.norm()
    for training in (False, True):
        mine = run(model, inputs, training)
        assert_equal(mine, pefts_run(family, training))
        assert all(g is not None and g.any() for g in mine.gradients.values())


def test_float32_is_as_close_to_float64_as_pefts(family):
    dtype = torch.float32
    inputs = family.inputs(dtype)
    mine, eager = run(swapped(family, dtype), inputs), run(with_peft(family, dtype), inputs)
    truth = pefts_run(family, training=False)
    assert_close_to_truth(mine.outputs, eager.outputs, truth.outputs.double(), FACTOR)
    assert_close_to_truth(mine.gradient, eager.gradient, truth.gradient, FACTOR)


def test_pefts_own_model_gives_the_same_when_it_is_swapped(family):
    model, inputs = all_linear(family), family.inputs()
    before = [run(model, inputs, training) for training in (False, True)]
    report = swap_(model)
    for training in (False, True):
        with fused_layers(model) as fused:
            assert_equal(run(model, inputs, training), before[training])
        why_not_fused(family, model, report, fused)  # fails where the report does not say it


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointed_activations_give_the_gradients_of_pefts(family):
    """Where a family computes in float32, rounding may differ from a run without checkpointing."""
    model, inputs = swapped(family), family.inputs()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers has no checkpointing for this family")
    peft = with_peft(family)
    for inner in (model, peft.base_model.model.model):
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(run(model, inputs, training=True), run(peft, inputs, training=True))


def test_a_16_bit_model_runs_with_float32_adapters(family):
    dtype = torch.bfloat16
    inputs, model = family.inputs(dtype), swapped(family, dtype)
    found = run(model, inputs)
    assert found.outputs.dtype == outputs(family.build(dtype), inputs).dtype
    assert found.outputs.isfinite().all()
    assert all(g is not None and g.isfinite().all() for g in found.gradients.values())
    assert found.gradient.dtype == torch.float32


GENERATING = [f for f in FAMILIES.values() if f.generates]


@pytest.mark.parametrize("family", GENERATING, ids=[f.name for f in GENERATING])
def test_generated_text_is_pefts(family):
    """With a cache, a step has one token for each text."""
    inputs = family.inputs()
    inputs.pop("labels")
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    found, expected = (
        torch.stack(model.generate(**inputs, **how, return_dict_in_generate=True).logits)
        for model in (swapped(family), with_peft(family).base_model.model.model)
    )
    assert_close(found, expected, **ROUNDINGS)


LEFT = [pytest.param(f, id=f.name) for f in FAMILIES.values() if f.no_pair]


@pytest.mark.parametrize("family", LEFT)
def test_all_linear_leaves_alone_what_the_model_does_not_call(family):
    """Nor does it give a pair to layers that are smaller than the rank, such as Qwen's gates."""
    names = [row.module for row in swap_(family.build(), r=2).rows]
    assert names and not [name for name in names if name_ends(name, family.no_pair)]
