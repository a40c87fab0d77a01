"""Each option of PEFT's `LoraConfig`: a swapped model is the same model, and the report is true."""

import dataclasses
import typing

import peft
import pytest
import torch
from peft_cases import CASES, FIELDS, INITS
from peft_checks import (
    assert_equal_runs,
    facts_of,
    files_of,
    flat,
    fused_calls,
    layers_named,
    run,
    swap_quietly,
)
from peft_models import input_of, output_of
from tolerance import assert_close_to_truth

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about these configurations


class Pair:
    """A case as PEFT runs it, and swapped, in float64."""

    def __init__(self, case):
        self.case, self.x = case, input_of(case.model)
        self.plain, self.swapped = case.build(), case.build()
        self.before = facts_of(self.swapped)
        self.report = swap_quietly(self.swapped)


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request):
    return Pair(request.param)


def test_every_field_of_peft_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    words = "add cases, or the words why there are none, to FIELDS in tests/support/peft_cases.py"
    assert fields == FIELDS.keys(), f"{words}: {sorted(fields ^ FIELDS.keys())}"


def test_every_initial_value_of_peft_is_in_the_table():
    kind = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    names = {v for t in typing.get_args(kind) for v in typing.get_args(t)} | {True, False}
    words = "add cases to INITS in tests/support/peft_cases.py"
    assert names <= INITS.keys(), f"{words}: {sorted(names - INITS.keys())}"


def test_nothing_but_the_class_of_the_layers_changes(pair):
    assert facts_of(pair.swapped) == pair.before
    assert list(pair.plain.state_dict()) == list(pair.swapped.state_dict())


def test_outputs_gradients_and_calls(pair):
    case, x = pair.case, pair.x
    wanted = run(pair.plain, x, output_of)
    with fused_calls(pair.swapped) as calls:
        found = run(pair.swapped, x, output_of)
    assert_equal_runs(wanted, found)
    assert set(calls.values()) <= {1} and len(calls) == case.fused
    assert bool(found[1]) != case.options.get("inference_mode", False)
    paths = layers_named(pair.swapped, pair.report)
    assert {name for name, path in paths.items() if path != "peft"} == set(calls)
    assert len(paths) == case.fused + case.own


def test_evaluation_without_gradients(pair):
    with torch.no_grad(), fused_calls(pair.swapped) as calls:
        y, z = (output_of(m.eval(), pair.x) for m in (pair.plain, pair.swapped))
    pair.plain.train(), pair.swapped.train()
    assert len(calls) == pair.case.fused
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)


def test_float32_is_as_near_to_float64_as_peft(pair):
    x = input_of(pair.case.model, torch.float32)
    truth, eager, swapped = (pair.case.build(torch.float32) for _ in range(3))
    swap_quietly(swapped)
    x64 = x.double() if x.is_floating_point() else x
    truth, eager = run(truth.double(), x64, output_of), run(eager, x, output_of)
    with fused_calls(swapped) as calls:
        found = run(swapped, x, output_of)
    assert len(calls) == pair.case.fused
    assert_close_to_truth(found[0], eager[0], truth[0], 2)
    if truth[1]:
        grads = (flat(grads) for grads in (found[1], eager[1], truth[1]))
        assert_close_to_truth(*grads, 3, torch.float32)


def test_files_are_equal_byte_by_byte(pair, tmp_path, monkeypatch):
    # The slowest part of saving; test_several_adapters.py compares a README.
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)
    for name, model in (("plain", pair.plain), ("swapped", pair.swapped)):
        model.save_pretrained(tmp_path / name)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "swapped")


def test_merging_is_pefts(pair):
    def merged(model):
        try:
            base = model.merge_and_unload()
        except Exception as error:  # what PEFT cannot merge
            return type(error), str(error)
        with torch.no_grad():
            return output_of(base, pair.x), base.state_dict()

    wanted, found = merged(pair.plain), merged(pair.swapped)
    if isinstance(wanted[0], type):
        assert found == wanted
        return
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, t in wanted[1].items():
        assert torch.equal(found[1][name], t), name
