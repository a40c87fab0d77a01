"""torch.distributed.checkpoint: a run that is saved on n processes goes on bit by bit on m."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp_runs import METHODS, make_model, shard, train, values
from ranks import run_ranks, short_form
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from deltadiff import DeltaLoRA

SAVED = ("LoRA", "factored", "in place", "remainder", "stochastic")


def new_run(method):
    dtype, how = METHODS[method]
    model = make_model(dtype)
    if dist.get_world_size() > 1:
        model = shard(model)
    return model, DeltaLoRA(model, lr=5e-3, **how)


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
    state, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=folder)
    return go_on(model, optimizer, rank)


def load(rank, method, folder):
    model, optimizer = new_run(method)
    state, of_optimizer = get_state_dict(model, optimizer)
    found = {"model": state, "optimizer": of_optimizer}
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    return go_on(model, optimizer, rank)


CASES = [(method, sizes) for method in SAVED for sizes in ((2, 2), (2, 1), (1, 2))]
SHORT = ("remainder", (2, 1)), ("factored", (1, 2))


@pytest.mark.parametrize("case", short_form(CASES, *SHORT), ids=str)
def test_saved_on_n_loaded_on_m(case, tmp_path):
    method, (saved, loaded) = case
    expected = run_ranks(save, method, str(tmp_path), size=saved)
    assert run_ranks(load, method, str(tmp_path), size=loaded) == [expected[0]] * loaded
