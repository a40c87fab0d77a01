"""Adapters of sharded models: the first process writes what one process would, and all can read."""

import pytest
import torch
from fsdp_runs import make_model, shard, train
from ranks import run_ranks, short_form

from deltadiff import DeltaLoRA, load_adapter, save_adapter

HOW = {
    "LoRA": {"update_ratio": 0.0},
    "in place": {},
    "factored": {"w_update": "factored"},
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits.tolist()


def save_sharded(rank, how, folder):
    model = shard(make_model())
    train(model, DeltaLoRA(model, lr=5e-3, **HOW[how]), rank)
    path = save_adapter(model, folder)
    return path.exists(), logits(model)


def load_sharded(rank, folder):
    model = shard(make_model())
    load_adapter(model, folder)
    return logits(model)


@pytest.mark.parametrize("how", short_form(HOW, "factored"))
def test_saved_by_the_first_process_and_read_by_all(how, tmp_path):
    model = make_model()
    train(model, DeltaLoRA(model, lr=5e-3, **HOW[how]))
    save_adapter(model, tmp_path / "whole")
    first, second = run_ranks(save_sharded, how, str(tmp_path / "sharded"))
    assert first == second == (True, logits(model))
    one, other = (sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("whole", "sharded"))
    assert one == other  # the names hold the hash of the tensors
    fresh = make_model()
    load_adapter(fresh, tmp_path / "sharded")
    assert run_ranks(load_sharded, str(tmp_path / "sharded")) == [logits(fresh)] * 2
