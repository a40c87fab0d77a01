"""A state that is garbled is refused with one typed error, and nothing is changed."""

import copy
import random
import warnings

import pytest
import torch
from delta_lora_runs import loss_of, make_model, output, snapshot, train
from older_states import as_older
from state_mutants import mutate

from deltadiff import DeltaLoRA, FusedAdamW
from deltadiff.errors import ArgumentError
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA
from deltadiff.optim.saved_state import FORMAT

MUTANTS = 10  # of each method, for each seed


def delta_lora(dtype=torch.float32, **options):
    model = make_model(dtype)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, **options)
    train(model, optimizer, 3, ratio_at=lambda t: 0.5 + 0.25 * (t == 2))
    return model, optimizer


def of_swapped(method):
    model = make_model(torch.float32)
    return model, method(model, lr=1e-2)


def adalora():
    torch.manual_seed(0)
    layers = torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)
    model = torch.nn.Sequential(*layers)
    swap_adalora_(model, init_r=3, seed=1)
    return model, AdaLoRA(model, lr=1e-2, total_step=20, target_r=2)


MAKE = {
    "FusedAdamW": lambda: of_swapped(FusedAdamW),
    "DyLoRA": lambda: of_swapped(DyLoRA),
    "AdaLoRA": adalora,
    "in place": delta_lora,
    "remainder": lambda: delta_lora(torch.bfloat16),
    "factored": lambda: delta_lora(w_update="factored"),
}


@pytest.mark.check(short=3, long=60)
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("method", MAKE)
def test_mutants_are_refused_or_loaded(method, older, seed, tally):
    draw = random.Random(seed)
    model, optimizer = MAKE[method]()
    train(model, optimizer, 2)
    good = copy.deepcopy(optimizer.state_dict())
    good = as_older(good, optimizer) if older else good
    train(model, optimizer, 2, start=2)
    start, failures = copy.deepcopy((model, optimizer)), []
    for _ in range(MUTANTS):
        state, words = mutate(good, draw)
        before = snapshot(model, optimizer)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.load_state_dict(state)
        except ArgumentError:
            now = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            if groups != now or not all(map(torch.equal, before, snapshot(model, optimizer))):
                failures.append(f"{words}: refused, and something was changed")
            continue
        except Exception as error:  # what this test is for
            failures.append(f"{words}: {type(error).__name__}: {error}")
        else:
            try:  # it changed a value that may be so
                loss_of(model, 0).backward()
                optimizer.step()
                output(model)
            except Exception as error:
                failures.append(f"{words}: loaded, then {type(error).__name__}: {error}")
        model, optimizer = copy.deepcopy(start)
    tally("mutants", "optimizer states", MUTANTS, len(failures))
    assert not failures, "\n".join(failures)


def test_a_newer_format_is_refused_with_the_reason():
    model, optimizer = delta_lora()
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["deltadiff.format"] += 1
    before = snapshot(model, optimizer)
    with pytest.raises(ArgumentError, match=f"format {FORMAT + 1}, of a newer deltadiff"):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))
