"""Accelerate, which shards a model whose optimizer is there already: right, and resumed."""

import pytest
import torch
from accelerate_runs import STATE_TYPES, make_accelerator, make_run
from fsdp_runs import train, values
from ranks import run_ranks, short_form

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
SHORT = (("FSDP2", "LoRA", "plain"),)


@pytest.mark.parametrize("case", short_form(CASES, *SHORT), ids=str)
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
