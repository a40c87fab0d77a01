"""The update of Delta-LoRA in the state of a model is read in all forms, or refused."""

import copy
import random
import warnings

import pytest
import torch
from delta_lora_runs import W_UPDATES, make_model, make_peft_model, output, train
from older_states import as_older_model
from state_mutants import mutate
from torch import nn

from deltadiff import DeltaLoRA, merge_, swap_, unswap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.lora_layers import lora_layers

MAKERS = {"ours": make_model, "peft": make_peft_model}


def trained(make, w_update="factored", dtype=torch.float32):
    """A model with two past updates and one that goes on, and its optimizer."""
    model = make(dtype)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, 5, ratio_at=lambda t: [0.5, 0.5, 0.75, 0.75, 0.25][t])
    return model, optimizer


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_older_states_are_read(make, w_update):
    model, _ = trained(make, w_update)
    state = model.state_dict()
    older = as_older_model(state)
    changed = older.keys() ^ state.keys()
    assert len([key for key in changed if "past_A." in key]) == 2 * 2  # of two layers
    fresh, same = make(torch.float32), make(torch.float32)
    fresh.load_state_dict(older)
    same.load_state_dict(state)
    assert torch.equal(output(fresh), output(model))
    ours, theirs = fresh.state_dict(), same.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())


# ------------------------------------------------------------------------- garbled ones


def copied(state):
    return {key: t.clone() for key, t in state.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(t, other[key]) for key, t in one.items())


def garbled(state, draw):
    """A state with one thing wrong in what it says of updates, and that in words."""
    own = {key: t for key, t in state.items() if ".delta." in key or ".deltas." in key}
    prefix = next(iter(own)).rpartition(".")[0]
    while True:
        changed, words = mutate({"state": own}, draw)
        found = changed.get("state") if isinstance(changed, dict) else None
        if isinstance(found, dict) and found and len(changed) == 1:
            break
    found = {k if k in own else f"{prefix}.{k}": value for k, value in found.items()}
    return {key: t for key, t in state.items() if key not in own} | found, words


@pytest.mark.check(short=2, long=60)
@pytest.mark.parametrize("older", [False, True], ids=["", "older"])
@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_mutants_are_refused_or_loaded(make, w_update, older, seed, tally):
    """By a model that has no update yet, and by one in the middle of a run."""
    draw, cases, failures = random.Random(seed), 10, []
    source = trained(make, w_update)[0].state_dict()
    source = as_older_model(source) if older else source
    running = trained(make, w_update)
    train(*running, 1, start=7)
    for i in range(cases):
        state, words = garbled(source, draw)
        model, optimizer = copy.deepcopy(running) if i % 2 else (make(torch.float32), None)
        before = copied(model.state_dict())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.load_state_dict(state)
        except ArgumentError:
            if not equal(model.state_dict(), before):
                failures.append(f"{words}: refused, and something was changed")
        except Exception as error:  # what this test is for
            failures.append(f"{words}: {type(error).__name__}: {error}")
        else:
            try:  # it changed a value that may be so
                optimizer = optimizer or DeltaLoRA(model, w_update=w_update)
                train(model, optimizer, 2)
                output(model)
                model.state_dict()
            except Exception as error:
                failures.append(f"{words}: loaded, then {type(error).__name__}: {error}")
    tally("mutants", "updates in states of models", cases, len(failures))
    assert not failures, "\n".join(failures)


WRONG = {
    "update": [lambda t: t[:4], lambda t: t * float("nan"), lambda t: -t, lambda t: t.tolist()],
    "anchor_A": [lambda t: t.T, lambda t: t[:-1], lambda t: t.int(), lambda t: None],
    "anchor_B": [lambda t: t[:, :-1], lambda t: t.to_sparse()],
    "rank_scale": [lambda t: t * float("nan"), lambda t: t + 1, lambda t: t[:-1]],
    "past_A": [lambda t: t[:-1], lambda t: t.to("meta"), lambda t: t[:, :-1]],
    "past_B": [lambda t: t.int(), lambda t: t[0]],
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("part", WRONG)
def test_a_garbled_part_is_named_and_nothing_changed(part, make):
    """Of the last layer that is loaded; and where the part is missing."""
    state = trained(make)[0].state_dict()
    key = [key for key in state if key.endswith(f".{part}")][-1]
    prefix = key.removesuffix(part)
    model = make(torch.float32)
    before = copied(model.state_dict())
    for wrong in (*WRONG[part], None):
        changed = dict(state)
        value = changed.pop(key)
        changed |= {} if wrong is None else {key: wrong(value)}
        with pytest.raises(ArgumentError) as error:
            model.load_state_dict(changed)
        assert str(error.value).startswith(prefix) and "in state_dict" in str(error.value)
        assert equal(model.state_dict(), before)
    changed = {**state, f"{prefix}more": torch.ones(1)}
    with pytest.raises(ArgumentError, match="more.*update, anchor_A, anchor_B, rank_scale"):
        model.load_state_dict(changed)
    assert equal(model.state_dict(), before)


def test_a_factored_state_for_a_run_in_place_changes_nothing():
    """What only the whole of a model and its optimizer can tell is asked first, too."""
    state = trained(make_model)[0].state_dict()
    model, _ = trained(make_model, "inplace")
    before = copied(model.state_dict())
    with pytest.raises(ArgumentError, match="factored"):
        model.load_state_dict(state)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize("end", [unswap_, merge_])
def test_the_check_goes_with_the_layers(end):
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 3)
    model = nn.Sequential(*layers)
    for name in ("0", "2"):
        swap_(model, r=2, target_modules=[name])
    assert len(model._load_state_dict_pre_hooks) == 1 and len(lora_layers(model)) == 2
    twin = copy.deepcopy(model)
    end(twin)
    assert not twin._load_state_dict_pre_hooks and len(model._load_state_dict_pre_hooks) == 1
    assert vars(twin).keys() == vars(nn.Sequential()).keys()
