"""DiffoRA's search in two processes: one gate matrix, that of one process with whole batches."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small_searches import assert_same, batch, snapshot, squares, stack

from deltadiff.diffora import Search
from deltadiff.errors import ArgumentError, NonFiniteLossError
from deltadiff.layers.lora_layers import lora_layers


def part_of(pair, rank, size):
    return tuple(t.chunk(size)[rank] for t in pair)


def run(state, model, rank=0, size=1):
    """Three rounds, of which a process sees its part of each batch; what it then has."""
    state.inner_step(lambda: squares(model, part_of(batch(0), rank, size)))
    for i in range(3):
        state.gate_step(lambda i=i: squares(model, part_of(batch(10 + i), rank, size)))
        for j in range(2):
            seed = 20 + 2 * i + j
            state.inner_step(lambda seed=seed: squares(model, part_of(batch(seed), rank, size)))
    gates = torch.stack([layer.gate for layer in state.layers.values()])
    trained = [p.detach() for p in state.trained.values()]
    return gates.tolist(), [t.tolist() for t in trained], state.inner_losses, state.gate_losses


def searched(rank):
    model = stack("abc", "ab")
    torch.manual_seed(100 + rank)  # without a seed of its own, A would differ between processes
    return run(Search(model, r=2, lr=1e-2), model, rank, 2)


def first_as_in_rank_0():
    model = stack("abc", "ab")
    torch.manual_seed(100)
    return run(Search(model, r=2, lr=1e-2), model)


def fails_in_one(rank):
    model = stack("ab")
    state = Search(model, r=2, seed=0)
    before = [p.detach().clone() for p in state.trained.values()]
    with pytest.raises(NonFiniteLossError):
        state.inner_step(lambda: squares(model, batch(0)) * (torch.inf if rank else 1.0))
    return all(map(torch.equal, before, (p.detach() for p in state.trained.values())))


def one_part_unused(rank):
    model = stack("ab")
    state = Search(model, r=2, seed=0)
    for i in range(2):
        used = model if rank else model.layers[0]
        state.inner_step(lambda i=i, used=used: used(batch(i)[0]).square().mean())
    return [p.detach().tolist() for p in state.trained.values()]


def refused(call):
    with pytest.raises(ArgumentError) as error:
        call()
    return str(error.value)


def unlike_searches(rank):
    """What is said of searches that differ between the processes; then nothing is swapped."""
    found = []
    for first, second in (
        ({"lr": 1e-2}, {"lr": 2e-2}),
        ({"lr": 1e-2}, {"lr": -1.0}),
        ({"target_modules": ["a", "b"]}, {"target_modules": ["a", "c"]}),
        ({"backend": None}, {"backend": "hopper"}),
    ):
        model = stack("abc", "abc")
        found.append(refused(lambda o=(first, second)[rank], m=model: Search(m, r=2, **o)))
        assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    alone = dist.new_group([0])
    if rank:
        found.append(refused(lambda: Search(stack("ab"), r=2, process_group=alone)))
    else:
        Search(stack("ab"), r=2, process_group=alone)
    return found


def unlike_states(rank):
    """What is said where each process loads another state; then both load one."""
    model = stack("ab", "ab")
    state, states = Search(model, r=2, lr=1e-2, seed=0), []
    for i in range(2):
        state.inner_step(lambda i=i: squares(model, batch(i)))
        states.append(copy.deepcopy(state.state_dict()))
    before = snapshot(state)
    texts = [
        refused(lambda: state.load_state_dict(states[rank])),
        refused(lambda: state.load_state_dict([states[0], {}][rank])),
    ]
    assert_same(snapshot(state), before)
    state.load_state_dict(states[0])
    assert state.index == 1
    return texts


def test_two_processes_search_as_one_does():
    first, second = run_ranks(searched)
    assert first == second
    expected = first_as_in_rank_0()
    for ours, one in zip(first, expected, strict=True):
        for mine, theirs in zip(ours, one, strict=True):
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(theirs), rtol=2e-4, atol=2e-6
            )


def test_a_loss_that_is_infinite_in_one_stops_all():
    assert run_ranks(fails_in_one) == [True, True]


def test_a_module_that_one_process_did_not_use():
    first, second = run_ranks(one_part_unused)
    assert first == second


def test_searches_that_differ_between_processes_are_refused_by_all():
    first, second = run_ranks(unlike_searches)
    assert first == second[:4] and len(second) == 5
    for text, words in zip(
        second,
        (
            "lr: got 0.01 in process 0 and 0.02 in process 1; accepted: the same in all",
            "lr: got -1.0",
            "layers.0.b.lora_A: got ((2, 6), torch.float32) in process 0 and nothing in process 1",
            "backend: got 'hopper'",
            "process_group: got a group that this process does not belong to",
        ),
        strict=True,
    ):
        assert words in text


def test_states_that_differ_between_processes_are_refused_by_all():
    first, second = run_ranks(unlike_states)
    assert first == second and first[0].startswith("state: got ")
    assert "in process 1" in first[0] and "a whole state" in first[1]
