"""Stage 1 of DiffoRA over data: the rounds, progress, continuing after a stop, bad input."""

import os
import signal
import sys
import threading

import pytest
import torch
from small_models import Block, Stack, build, loss_of

from deltadiff.diffora import Search, search, split
from deltadiff.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    Interrupted,
    NonFiniteLossError,
)

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
SETTINGS = {"rounds": 6, "inner_steps": 3, "batch_size": 4, "seed": 5}


def new(names=("abc", "ab"), **options) -> Search:
    torch.manual_seed(0)
    return Search(Stack(*map(Block, names)), r=2, lr=1e-2, gate_lr=1e-1, seed=0, **options)


def loss_by(state, seen=None):
    def loss(indices):
        if seen is not None:
            seen.append(indices)
        return (state.model(X[indices]) - Y[indices]).square().mean()

    return loss


# ----------------------------------------------------------------------- rounds


def test_a_round_is_one_gate_step_then_inner_steps():
    state, seen = new(), []
    data = split(40, valid_share=0.25)
    gates = search(state, loss_by(state, seen), data, **SETTINGS)
    assert len(seen) == 6 * 4 and all(len(set(batch)) == 4 for batch in seen)
    for k, batch in enumerate(seen):
        assert set(batch) <= set(data.valid if k % 4 == 0 else data.train)
    firsts = [i for k in range(0, 8, 4) for i in seen[k]]
    assert len(set(firsts)) == 8  # an example comes again only after all others
    assert gates == state.gates() and (state.round, state.index) == (6, 3)
    assert len(state.gate_losses) == 6 and len(state.inner_losses) == 18
    other = new()
    search(other, loss_by(other), data, **{**SETTINGS, "seed": 6})
    assert other.gates() != gates


def test_a_search_on_a_real_model_shows_its_progress(capsys):
    state = Search(build("bert"), r=2, modules_to_save=["classifier"], seed=0)
    search(
        state, lambda i: loss_of(state.model, i), split(64), rounds=2, inner_steps=2, batch_size=8
    )
    err = capsys.readouterr().err
    assert "search: 100%" in err and "2/2" in err


def test_progress_is_told_after_each_round(capsys):
    state, told = new(), []
    search(state, loss_by(state), split(40), progress=lambda *rest: told.append(rest), **SETTINGS)
    assert [(number, rounds) for number, rounds, _ in told] == [(i + 1, 6) for i in range(6)]
    last = {"valid": state.gate_losses[-1], "train": state.inner_losses[-1]}
    assert told[-1][2] == last and told[0][2] != last
    assert not capsys.readouterr().err


def test_a_search_without_tqdm_shows_nothing(capsys, monkeypatch):
    with_bar, without = new(), new()
    search(with_bar, loss_by(with_bar), split(40), **SETTINGS)
    assert "search: 100%" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    search(without, loss_by(without), split(40), **SETTINGS)
    assert not capsys.readouterr().err and with_bar.gates() == without.gates()


def tensors(state):
    found = {**state.trained, "logits": state.logits}
    moments = {
        f"{i}.{name}": t
        for optimizer in (state.optimizer, state.gate_optimizer)
        for i, s in enumerate(optimizer.state.values())
        for name, t in s.items()
        if isinstance(t, torch.Tensor)
    }
    return {k: t.detach().clone() for k, t in (found | moments).items()}


@pytest.mark.parametrize("stop_at", [1, 2, 4, 9, 12, 24])
def test_going_on_after_ctrl_c_is_bit_by_bit_the_same(tmp_path, stop_at):
    data = split(40)
    whole = new()
    gates = search(whole, loss_by(whole), data, **SETTINGS)

    state, calls = new(), []

    def loss(indices):
        calls.append(indices)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_by(state)(indices)

    with pytest.raises(Interrupted, match=r"search\.pt"):
        search(state, loss, data, folder=tmp_path / "run", **SETTINGS)
    assert len(calls) == stop_at  # it stops after the step that was under way
    again = new()
    with torch.no_grad():  # values that the file must replace
        again.logits.fill_(0.1)
        for p in again.trained.values():
            p.add_(0.1)
    rest = []
    found = search(
        again, loss_by(again, rest), data, folder=tmp_path / "run", resume=True, **SETTINGS
    )
    assert found == gates and len(calls) + len(rest) == 24
    assert (again.gate_losses, again.inner_losses) == (whole.gate_losses, whole.inner_losses)
    ours, theirs = tensors(again), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_it_runs_in_any_thread():
    """Signals are for the main thread alone, where Python allows handlers."""
    whole, state, found = new(), new(), []
    gates = search(whole, loss_by(whole), split(40), **SETTINGS)

    def run():
        found.append(search(state, loss_by(state), split(40), **SETTINGS))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [gates]


def test_random_numbers_go_on_too(tmp_path):
    """A model with dropout that was stopped after a save ends like one that was not."""
    data = split(40)

    def noisy(state):
        return lambda i: (
            (torch.nn.functional.dropout(state.model(X[i]), 0.5) - Y[i]).square().mean()
        )

    torch.manual_seed(9)
    whole = new()
    search(whole, noisy(whole), data, **SETTINGS)
    state = new()
    search(state, noisy(state), data, folder=tmp_path, **{**SETTINGS, "rounds": 3})
    torch.manual_seed(1234)
    again = new()
    search(again, noisy(again), data, folder=tmp_path, resume=True, **SETTINGS)
    assert torch.equal(again.logits, whole.logits)


def test_a_crash_loses_no_more_than_since_the_last_save(tmp_path):
    data, state = split(40), new()

    def loss(indices):
        if state.round == 5:
            raise KeyError("labels")  # not an error of the search: it passes
        return loss_by(state)(indices)

    with pytest.raises(KeyError, match="labels"):
        search(state, loss, data, folder=tmp_path, save_every=2, **SETTINGS)
    again = new()
    search(again, loss_by(again), data, folder=tmp_path, resume=True, **SETTINGS)
    whole = new()
    assert search(whole, loss_by(whole), data, **SETTINGS) == again.gates()
    assert [p.name for p in tmp_path.iterdir()] == ["search.pt"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tmp_path):
    data, state, calls = split(40), new(), []

    def loss(indices):
        calls.append(indices)
        return loss_by(state)(indices) * (float("nan") if len(calls) == 7 else 1)

    with pytest.raises(NonFiniteLossError, match="nan at training batch 2 of round 2"):
        search(state, loss, data, folder=tmp_path, **SETTINGS)
    assert (state.round, state.index) == (2, 1)
    good = tensors(state)
    again = new()
    search(again, loss_by(again), data, folder=tmp_path, resume=True, **{**SETTINGS, "rounds": 2})
    whole = new()
    search(whole, loss_by(whole), data, **{**SETTINGS, "rounds": 2})
    assert torch.equal(again.logits, whole.logits)  # with a good batch it continues from there
    assert all(torch.isfinite(t).all() for t in good.values())


# ----------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"rounds": 0}, ArgumentError, "rounds: got 0"),
        ({"inner_steps": 1.5}, ArgumentTypeError, "inner_steps"),
        ({"batch_size": True}, ArgumentTypeError, "batch_size"),
        ({"batch_size": 21}, ArgumentError, "batch_size: got 21; accepted: 1 to 20"),
        ({"save_every": 0}, ArgumentError, "save_every"),
        ({"resume": True}, ArgumentError, "folder"),
        ({"folder": ""}, ArgumentError, "folder: got ''; accepted: a folder"),
        ({"folder": 3}, ArgumentTypeError, "folder: got 3"),
    ],
)
def test_settings_that_cannot_be(change, error, words):
    state = new()
    with pytest.raises(error, match=words):
        search(state, loss_by(state), split(40), **{**SETTINGS, **change})
    assert state.round == 0


def test_a_search_that_cannot_be_resumed(tmp_path):
    data, state = split(40), new()
    search(state, loss_by(state), data, folder=tmp_path, **SETTINGS)
    fresh = new()
    with pytest.raises(ArgumentError, match="which holds a search"):
        search(fresh, loss_by(fresh), data, folder=tmp_path, **SETTINGS)
    go_on = {**SETTINGS, "folder": tmp_path, "resume": True}
    for change, words in (
        ({"seed": 7}, "seed: got 7; accepted: 5"),
        ({"inner_steps": 2}, "inner_steps"),
        ({"batch_size": 2}, "batch_size"),
    ):
        with pytest.raises(ArgumentError, match=words):
            search(fresh, loss_by(fresh), data, **{**go_on, **change})
    with pytest.raises(ArgumentError, match="train"):
        search(fresh, loss_by(fresh), split(40, seed=1), **go_on)
    other = new(("abc", "ad"))
    with pytest.raises(ArgumentError, match=r"candidates: got layers.1.b; accepted: layers.1.d"):
        search(other, loss_by(other), data, **go_on)
    with pytest.raises(CheckpointError, match="No such file"):
        search(fresh, loss_by(fresh), data, **{**go_on, "folder": tmp_path / "none"})
    file = tmp_path / "search.pt"
    blob = file.read_bytes()
    file.write_bytes(blob[: len(blob) // 2])
    with pytest.raises(CheckpointError, match=r"search\.pt"):
        search(fresh, loss_by(fresh), data, **go_on)
    assert fresh.round == 0 and not fresh.logits.any()
