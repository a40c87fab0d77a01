"""Rounds of DiffoRA's search in two processes: those of one process, with each batch divided."""

import contextlib
import io
import os
import signal

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from small_searches import assert_same, snapshot, stack

from deltadiff.diffora import Search, search, search_file, split
from deltadiff.errors import ArgumentError, Interrupted, NonFiniteLossError
from deltadiff.files import read_sealed

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
SETTINGS = {"rounds": 4, "inner_steps": 2, "batch_size": 4, "seed": 5}
STEPS = 4 * 3


def new(**options):
    return Search(stack("abc", "ab"), r=2, lr=1e-2, gate_lr=1e-1, seed=0, **options)


def loss_by(state, seen=None, dropout=0.0):
    def loss(indices):
        if seen is not None:
            seen.append(indices)
        y = torch.nn.functional.dropout(state.model(X[indices]), dropout)
        return (y - Y[indices]).square().mean()

    return loss


def result(state):
    trained = [p.detach().flatten().tolist() for p in state.trained.values()]
    return [state.logits.flatten().tolist(), state.gate_losses, state.inner_losses, *trained]


# ------------------------------------------------------------------------- the same search


def rounds_by_parts(rank):
    """What a process has after all rounds, which examples it saw, and what it showed."""
    state, seen, shown = new(), [], io.StringIO()
    with contextlib.redirect_stderr(shown):
        gates = search(state, loss_by(state, seen), split(40), **SETTINGS)
    assert gates == state.gates()
    return result(state), seen, "search: 100%" in shown.getvalue()


def test_two_processes_are_one_with_each_batch_divided():
    (first, of_first, bar), (second, of_second, other_bar) = run_ranks(rounds_by_parts)
    assert first == second
    state, seen = new(), []
    search(state, loss_by(state, seen), split(40), progress=lambda *_: None, **SETTINGS)
    assert [a + b for a, b in zip(of_first, of_second, strict=True)] == seen
    for ours, one in zip(first, result(state), strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert bar and not other_bar


# ------------------------------------------------------------------------ stop and go on


def stopped_and_resumed(rank, folder):
    """Both processes draw masks of their own; a signal to one stops both."""
    data = split(40)

    def run(seed, **how):
        state = new()
        torch.manual_seed(seed)
        search(state, loss_by(state, dropout=0.5), data, **SETTINGS | how)
        return result(state)

    whole, alike = run(70 + rank), run(70)
    state, calls = new(), []
    torch.manual_seed(70 + rank)
    noisy = loss_by(state, calls, dropout=0.5)

    def loss(indices):
        if rank == 1 and len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return noisy(indices)

    with pytest.raises(Interrupted) as stop:
        search(state, loss, data, folder=folder, **SETTINGS)
    place = state.round, state.index, stop.value.number
    resumed = run(1234, folder=folder, resume=True)
    return alike != whole == resumed, place, str(stop.value)


def resumed_alone(folder):
    state = new()
    before, generator = snapshot(state), torch.get_rng_state()
    how = SETTINGS | {"rounds": 5, "folder": folder, "resume": True}
    with pytest.raises(ArgumentError) as error:
        search(state, loss_by(state), split(40), **how)
    assert_same(snapshot(state), before)
    assert torch.equal(torch.get_rng_state(), generator)
    return str(error.value)


def test_a_signal_to_one_stops_both_and_both_go_on_bit_by_bit(tmp_path):
    found = run_ranks(stopped_and_resumed, tmp_path)
    path = tmp_path / "search.pt"
    assert found == [(True, (3, 0, signal.SIGTERM), str(path))] * 2
    assert [*tmp_path.iterdir()] == [path]
    assert "processes: got 1; accepted: 2, each of which had" in resumed_alone(tmp_path)


def half_way(rank, folder):
    torch.manual_seed(3)
    state = new()
    search(state, loss_by(state), split(40), folder=folder, **SETTINGS | {"rounds": 2})


def test_one_process_goes_on_where_two_had_the_same_random_numbers(tmp_path):
    run_ranks(half_way, tmp_path)
    state, whole = new(), new()
    search(state, loss_by(state), split(40), folder=tmp_path, resume=True, **SETTINGS)
    search(whole, loss_by(whole), split(40), **SETTINGS)
    for ours, one in zip(result(state), result(whole), strict=True):
        assert ours == pytest.approx(one, rel=1e-4, abs=1e-6)


def infinite_in_one(rank, folder):
    state, calls = new(), []

    def loss(indices):
        calls.append(indices)
        return loss_by(state)(indices) * (torch.inf if rank and len(calls) == 6 else 1.0)

    with pytest.raises(NonFiniteLossError, match="the loss is inf at training batch 2 of round 2"):
        search(state, loss, split(40), folder=folder, **SETTINGS)
    stopped = result(state)
    again = new()
    saved = torch.load(io.BytesIO(read_sealed(folder / "search.pt")), weights_only=True)
    again.load_state_dict(saved["search"])
    return stopped == result(again), (state.round, state.index)


def test_a_loss_that_is_infinite_in_one_stops_both_and_is_not_saved(tmp_path):
    assert run_ranks(infinite_in_one, tmp_path) == [(True, (2, 1))] * 2


# ------------------------------------------------------------------------------ refusals


def refusals(rank, folder):
    """What each process is told, and that nothing has changed by then."""
    state = new()
    before, generator = snapshot(state), torch.get_rng_state()
    texts = []

    def refused(*unlike, error=ArgumentError, **how):
        """A search whose arguments are ``how``, and in each process its own of ``unlike``."""
        how = SETTINGS | {"data": split(40)} | how | (unlike[rank] if unlike else {})
        with pytest.raises(error) as caught:
            search(state, loss_by(state), **how)
        texts.append(f"{type(caught.value).__name__}: {caught.value}")
        assert_same(snapshot(state), before)
        assert torch.equal(torch.get_rng_state(), generator)

    refused(batch_size=3)
    refused({}, {"batch_size": 0})
    refused({}, {"rounds": 5})
    refused({}, {"data": split(40, seed=1)})
    refused({}, {"resume": True, "folder": folder})
    refused({"folder": folder}, {"folder": folder / "other"})
    refused({}, {"folder": ""})
    refused(resume=True, folder=folder)
    dist.barrier()
    if rank == 0:
        (folder / "search.pt").write_bytes(b"sha256 0\n")
    dist.barrier()
    refused(folder=folder)
    refused(resume=True, folder=folder)
    return texts


def test_what_one_process_cannot_do_is_refused_by_both(tmp_path):
    first, second = run_ranks(refusals, tmp_path)
    assert first == second
    for text, words in zip(
        first,
        (
            "ArgumentError: batch_size: got 3; accepted: a multiple of 2, the number of processes",
            "ArgumentError: batch_size: got 0",
            "ArgumentError: rounds: got 4 in process 0 and 5 in process 1; accepted: the same",
            "ArgumentError: train: got [",
            "ArgumentError: resume: got False in process 0 and True in process 1",
            "ArgumentError: folder: got",
            "ArgumentError: folder: got ''",
            "CheckpointError: ",
            "which holds a search; accepted: resume=True, or another",
            "CheckpointError: ",
        ),
        strict=True,
    ):
        assert words in text
    assert "No such file" in first[7] and "another SHA-256" in first[9]


def full_disk(rank, folder):
    """The first process cannot write, of which the other hears."""

    def fail(path, blob):
        assert rank == 0
        raise OSError(28, "No space left on device")

    search_file.write_sealed = fail
    state = new()
    with pytest.raises(OSError) as error:
        search(state, loss_by(state), split(40), folder=folder, save_every=2, **SETTINGS)
    cause = error.value.__cause__
    return str(error.value), None if cause is None else str(cause), state.round


def test_a_disk_that_is_full_stops_both(tmp_path):
    text = "[Errno 28] No space left on device"
    cause = "process 0 of 2 raised this error"
    assert run_ranks(full_disk, tmp_path) == [(text, None, 2), (text, cause, 2)]
