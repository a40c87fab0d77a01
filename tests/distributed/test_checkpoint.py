"""torch.distributed.checkpoint: a run that is saved on n processes goes on bit by bit on m."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import (
    METHODS,
    load_checkpoint,
    make_model,
    make_peft_model,
    save_checkpoint,
    shard,
    shard_peft,
    train,
    values,
)
from ranks import run_ranks, short_form
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from deltadiff import DeltaLoRA

SAVED = ("LoRA", "factored", "in place", "remainder", "stochastic")


def new_run(method, **options):
    dtype, how = METHODS[method]
    model = make_model(dtype)
    if dist.get_world_size() > 1:
        model = shard(model, **options)
    return model, DeltaLoRA(model, lr=5e-3, **how)


def new_peft_run(method, **options):
    dtype, how = METHODS[method]
    model = shard_peft(make_peft_model(dtype), alone=True, **options)
    return model, DeltaLoRA(model, lr=5e-3, **{"w_update": "inplace", **how})


def go_on(model, optimizer, rank):
    """Three more steps, in which every process sees all of each batch."""
    for t in range(10, 13):
        ids = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(t))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def save(rank, method, folder):
    model, optimizer = new_run(method)
    train(model, optimizer, rank, dist.get_world_size(), steps=4)
    save_checkpoint(model, optimizer, folder)
    return go_on(model, optimizer, rank)


def load(rank, method, folder):
    model, optimizer = new_run(method)
    load_checkpoint(model, optimizer, folder)
    return go_on(model, optimizer, rank)


CASES = [(method, sizes) for method in SAVED for sizes in ((2, 2), (2, 1), (1, 2))]
SHORT = ("remainder", (2, 1)), ("factored", (1, 2))


@pytest.mark.parametrize("case", short_form(CASES, *SHORT), ids=str)
def test_saved_on_n_loaded_on_m(case, tmp_path):
    method, (saved, loaded) = case
    expected = run_ranks(save, method, str(tmp_path), size=saved)
    assert run_ranks(load, method, str(tmp_path), size=loaded) == [expected[0]] * loaded


ON_FIRST = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
ON_ALL = StateDictOptions(full_state_dict=True)


def whole_states(rank, method, in_peft, replicas=1):
    """A run that goes on, and new ones that go on from whole states, of the first process or all.

    Lambda changes on the way, so that the states hold a past update, which a new run does not.
    """
    start = new_peft_run if in_peft else new_run
    if replicas > 1:
        shape = replicas, dist.get_world_size() // replicas
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        start = functools.partial(start, mesh=mesh)
    model, optimizer = start(method)
    for ratio in (0.5, optimizer.param_groups[0]["update_ratio"] / 2):
        for group in optimizer.param_groups:
            group["update_ratio"] = ratio * (METHODS[method][1].get("update_ratio", 1) > 0)
        train(model, optimizer, rank, dist.get_world_size(), steps=4)
    kept = [
        (copy.deepcopy(get_state_dict(model, optimizer, options=get)), put)
        for get, put in ((ON_FIRST, FROM_FIRST), (ON_ALL, ON_ALL))
    ]
    assert [bool(state) for state in kept[0][0]] == [rank == 0] * 2
    found = [go_on(model, optimizer, rank)]
    for (of_model, of_optimizer), options in kept:
        model, optimizer = start(method)
        set_model_state_dict(model, of_model, options=options)
        set_optimizer_state_dict(model, optimizer, of_optimizer, options=options)
        found.append(go_on(model, optimizer, rank))
    return found


@pytest.mark.filterwarnings("ignore:.*rounding")
@pytest.mark.parametrize("method", short_form(METHODS, "remainder"))
@pytest.mark.parametrize("in_peft", short_form([False, True], False), ids=["own", "PEFT's"])
def test_whole_states_of_the_first_process_and_of_all(in_peft, method):
    first, second = run_ranks(whole_states, method, in_peft)
    assert first == second == first[:1] * 3


@pytest.mark.long
@pytest.mark.parametrize("in_peft", [False, True], ids=["own", "PEFT's"])
@pytest.mark.parametrize("method", ["remainder", "factored"])
def test_replicas_of_shards(method, in_peft):
    results = run_ranks(whole_states, method, in_peft, 2, size=4)
    assert all(result == results[0][:1] * 3 for result in results)
