"""AdaLoRA, DyLoRA and FLoRA under FSDP2: two processes are one, and so is what they save."""

import copy

import pytest
import torch
import torch.distributed as dist
from flora_runs import draw_cores
from fsdp_runs import load_checkpoint, make_base, parts_of, save_checkpoint, shard, values
from ranks import run_ranks, short_form
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from deltadiff import FusedAdamW, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.flora import swap_flora_
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA, truncate_

STEPS, F32, BF16 = 6, torch.float32, torch.bfloat16
SCHEDULE = {"total_step": STEPS, "target_r": 3, "tinit": 1, "tfinal": 1, "deltaT": 2}
# dtype of the base, and the arguments of `swap_adalora_`, DyLoRA or `swap_flora_`
METHODS = {
    "AdaLoRA": (F32, {}),
    "AdaLoRA, bf16": (BF16, {}),
    "DyLoRA": (F32, {}),
    "DyLoRA, frozen": (F32, {"frozen": True, "r_max": 5, "scale": "alpha/r"}),
    "DyLoRA, bf16": (BF16, {"seed": 2}),
    "FLoRA": (F32, {}),
    "FLoRA, bf16, lean": (BF16, {"lean": True}),
}


def make(method, r, sharding=None):
    dtype, how = METHODS[method]
    model = make_base(dtype)
    kind = method.partition(",")[0]
    if kind == "AdaLoRA":
        swap_adalora_(model, init_r=r, seed=1, **how)
    elif kind == "FLoRA":
        swap_flora_(model, r=r, seed=1, **how)
        draw_cores(model)
    else:
        swap_(model, r=r, seed=1)
    model = model.train() if sharding is None else shard(model.train(), **sharding)
    if kind == "AdaLoRA":
        return model, AdaLoRA(model, lr=5e-3, **SCHEDULE)
    if kind == "FLoRA":
        return model, FusedAdamW(model, lr=5e-3)
    return model, DyLoRA(model, lr=5e-3, **how)


def train(model, optimizer, rank, size, steps=range(STEPS)):
    """As `fsdp_runs.train`, with AdaLoRA's regulariser beside each process's own loss."""
    regular = getattr(optimizer, "orthogonality", lambda: 0.0)
    for t in steps:
        parts = parts_of(t, size)
        losses = [model(input_ids=ids, labels=ids).loss for ids in parts] if rank is None else []
        if rank is not None:
            (model(input_ids=parts[rank], labels=parts[rank]).loss + regular()).backward()
        for loss in losses:
            (loss / size).backward()
        if rank is None and hasattr(optimizer, "orthogonality"):
            regular().backward()
        optimizer.step()
        optimizer.zero_grad()


def result(model, optimizer):
    """All values, the ranks of the layers or that of the next step, and what the state holds."""
    state = optimizer.state_dict()["state"].values()
    kept = [{name: tuple(t.shape) for name, t in entry.items()} for entry in state]
    ranks = optimizer.ranks() if hasattr(optimizer, "ranks") else getattr(optimizer, "rank", None)
    return values(model), ranks, kept


def train_sharded(rank, method, r):
    found = []
    for sharding in ({}, {"reshard_after_forward": False}):
        model, optimizer = make(method, r, sharding)
        train(model, optimizer, rank, dist.get_world_size())
        found.append(result(model, optimizer))
    return found


def train_alone(method, size, r):
    model, optimizer = make(method, r)
    train(model, optimizer, None, size)
    return result(model, optimizer)


@pytest.mark.parametrize("method", short_form(METHODS, "AdaLoRA", "DyLoRA, frozen"))
def test_two_processes_are_one_bit_by_bit(method):
    first, second = run_ranks(train_sharded, method, 6)
    assert first == second == [train_alone(method, 2, 6)] * 2


@pytest.mark.long
@pytest.mark.parametrize("method", ["AdaLoRA", "DyLoRA", "FLoRA"])
def test_ranks_that_leave_processes_without_a_row(method):
    results = run_ranks(train_sharded, method, 4, size=3)
    assert results[0] == results[1] == results[2] and results[0][0] == results[0][1]


def resume(rank, method, folder):
    """Save after three steps, on this many processes; load into a new run and go on."""
    size = dist.get_world_size()
    model, optimizer = make(method, 6, {})
    train(model, optimizer, rank, size, range(3))
    options = StateDictOptions(full_state_dict=True)
    states = get_state_dict(model, optimizer, options=options)
    of_model, of_optimizer = copy.deepcopy(states)  # counts lie in the memory of the run
    save_adapter(model, folder)
    train(model, optimizer, rank, size, range(3, STEPS))
    other, second = make(method, 6, {})
    set_model_state_dict(other, of_model, options=options)
    set_optimizer_state_dict(other, second, of_optimizer, options=options)
    train(other, second, rank, size, range(3, STEPS))
    third, _ = make(method, 6, {})
    load_adapter(third, folder)
    same = result(model, optimizer) == result(other, second)
    return same, values(third)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_states_and_adapters(method, tmp_path):
    (same, loaded), other = run_ranks(resume, method, str(tmp_path))
    model, optimizer = make(method, 6)
    train(model, optimizer, None, 2, range(3))
    assert same and other == (True, loaded) and loaded == values(model)


def new_run(method):
    return make(method, 6, {} if dist.get_world_size() > 1 else None)


def go_on(model, optimizer):
    """More steps, in which every process sees all of each batch."""
    for t in range(3, STEPS):
        ids = parts_of(t, 1)[0]
        loss = model(input_ids=ids, labels=ids).loss
        (loss + getattr(optimizer, "orthogonality", lambda: 0.0)()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def save(rank, method, folder):
    model, optimizer = new_run(method)
    train(model, optimizer, rank, dist.get_world_size(), range(3))
    save_checkpoint(model, optimizer, folder)
    return go_on(model, optimizer)


def load(rank, method, folder):
    model, optimizer = new_run(method)
    load_checkpoint(model, optimizer, folder)
    return go_on(model, optimizer)


@pytest.mark.long
@pytest.mark.parametrize("method", ["AdaLoRA", "DyLoRA", "FLoRA"])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 1), (1, 2)], ids=str)
def test_saved_on_n_loaded_on_m(method, sizes, tmp_path):
    expected = run_ranks(save, method, str(tmp_path), size=sizes[0])
    assert run_ranks(load, method, str(tmp_path), size=sizes[1]) == [expected[0]] * sizes[1]


def merged(rank, method):
    model, optimizer = make(method, 6, {})
    train(model, optimizer, rank, 2, range(3))
    merge_(model)
    return values(model)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_merged(method):
    model, optimizer = make(method, 6)
    train(model, optimizer, None, 2, range(3))
    merge_(model)
    assert run_ranks(merged, method) == [values(model)] * 2


def refused(rank, folder):
    model = make_base(F32)
    swap_(model, r=4, seed=1)
    model = shard(model)
    with pytest.raises(ArgumentError, match="seed: got .* the same in all of them"):
        DyLoRA(model, seed=rank)
    with pytest.raises(SwapError, match="truncate_.*sharded"):
        truncate_(model, 2)
    swapped = make_base(F32)
    swap_adalora_(swapped, init_r=4, seed=1)
    swapped = shard(swapped)
    save_adapter(swapped, folder)
    with pytest.raises(SwapError, match="without the gate of the adapter"):
        load_adapter(model, folder)
    return True


def test_what_is_refused(tmp_path):
    assert run_ranks(refused, str(tmp_path)) == [True] * 2
