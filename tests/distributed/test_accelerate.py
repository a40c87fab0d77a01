"""Accelerate, which shards a model whose optimizer is there already: right, and resumed."""

import copy

import pytest
import torch
from accelerate_runs import STATE_TYPES, make_accelerator, make_run
from fsdp_runs import train, values
from ranks import run_ranks, short_form

from deltadiff import DeltaLoRA
from deltadiff.errors import SwapError

METHODS = ("LoRA", "factored", "in place", "remainder", "stochastic")
KINDS = ["plain", "peft"]
PARALLEL = ["DDP", "FSDP2"]
pytestmark = pytest.mark.filterwarnings("ignore:.*rounding", "ignore:PEFT's adapter files")


def train_prepared(rank, parallel, method, kind, options):
    model, optimizer = make_run(method, kind == "peft")
    model, optimizer = make_accelerator(parallel, **options).prepare(model, optimizer)
    train(model, optimizer, rank)
    return values(model)


def train_alone(method, kind):
    model, optimizer = make_run(method, kind == "peft")
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
    train(model, optimizer)
    return values(model)


CASES = [(parallel, method, kind) for parallel in PARALLEL for method in METHODS for kind in KINDS]


@pytest.mark.parametrize("case", short_form(CASES), ids=str)  # a resumed run is in the short form
def test_two_processes_are_one(case):
    parallel, method, kind = case
    options = {} if parallel == "DDP" else {"cpu_ram_efficient_loading": kind == "plain"}
    first, second = run_ranks(train_prepared, parallel, method, kind, options)
    assert first == second
    for ours, theirs in zip(first, train_alone(method, kind), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=3e-6)


def save_and_resume(rank, parallel, method, kind, options, folder):
    """What six steps give, and the last three of them once more from the checkpoint."""
    found = []
    for checkpoint in (None, folder):
        accelerator = make_accelerator(parallel, **options)
        model, optimizer = accelerator.prepare(*make_run(method, kind == "peft"))
        if checkpoint is None:
            train(model, optimizer, rank, steps=3)
            accelerator.save_state(folder)
        else:
            accelerator.load_state(folder)
        train(model, optimizer, rank, steps=3)
        found.append(values(model))
    return found


STATES = [
    (parallel, method, kind, state)
    for parallel in PARALLEL
    for method in METHODS
    for kind in KINDS
    for state in (STATE_TYPES if parallel == "FSDP2" else [None])
]
SHORT_STATES = (("FSDP2", "remainder", "plain", "SHARDED_STATE_DICT"),)


@pytest.mark.parametrize("case", short_form(STATES, *SHORT_STATES), ids=str)
def test_a_saved_state_is_resumed_bit_by_bit(case, tmp_path):
    parallel, method, kind, state = case
    options = {} if state is None else {"state_dict_type": state}
    first, second = run_ranks(save_and_resume, parallel, method, kind, options, str(tmp_path))
    assert first == second == [first[0]] * 2


def prepare_late(rank, cpu_ram_efficient_loading):
    """What says that a model is sharded after its first step."""
    model, optimizer = make_run("factored")
    train(model, optimizer, steps=2)
    accelerator = make_accelerator("FSDP2", cpu_ram_efficient_loading=cpu_ram_efficient_loading)
    with pytest.raises(SwapError) as error:
        train(*accelerator.prepare(model, optimizer), rank, steps=1)
    return str(error.value)


def test_a_model_that_is_sharded_after_its_first_step_is_refused():
    for text in run_ranks(prepare_late, False):
        assert "in the place of those that it trained" in text
        assert "prepare(model, optimizer)` before the first step" in text
    for text in run_ranks(prepare_late, True):
        assert "device: got meta, where the update of Delta-LoRA" in text
        assert "cpu_ram_efficient_loading=False" in text


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_has_not_begun_waits_while_a_model_is_on_meta(kind):
    model, optimizer = make_run("factored", kind == "peft")
    optimizer.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(model.state_dict())
    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    blocks.to("meta")  # all of the model has buffers, which no state has
    model.load_state_dict(before, assign=True)
    twin, other = make_run("factored", kind == "peft")
    other.load_state_dict(other.state_dict())
    optimizer = DeltaLoRA(model, lr=5e-3, w_update="factored")
    train(model, optimizer, steps=3)
    train(twin, other, steps=3)
    assert values(model) == values(twin)
