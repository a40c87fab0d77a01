"""DiffoRA's search in two processes: one gate matrix, that of one process with whole batches."""

import pytest
import torch
from ranks import run_ranks
from small_searches import batch, squares, stack

from deltadiff.diffora import Search, search, split
from deltadiff.errors import ArgumentError, NonFiniteLossError


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


def test_two_processes_search_as_one_does():
    first, second = run_ranks(searched)
    assert first == second
    expected = first_as_in_rank_0()
    for ours, one in zip(first, expected, strict=True):
        for mine, theirs in zip(ours, one, strict=True):
            torch.testing.assert_close(
                torch.tensor(mine), torch.tensor(theirs), rtol=2e-4, atol=2e-6
            )


def searches_in_rounds(rank):
    state = Search(stack("abc", "ab"), r=2)
    data = split(8)
    try:
        search(state, lambda indices: None, data, rounds=1, inner_steps=1, batch_size=2)
    except ArgumentError as error:
        return str(error)


def test_rounds_of_several_processes_are_refused():
    """They would do the same work in each process, and write one file together."""
    for told in run_ranks(searches_in_rounds):
        assert "2 processes" in told and "`Search.gate_step` and `inner_step`" in told


def test_a_loss_that_is_infinite_in_one_stops_all():
    assert run_ranks(fails_in_one) == [True, True]


def test_a_module_that_one_process_did_not_use():
    first, second = run_ranks(one_part_unused)
    assert first == second
