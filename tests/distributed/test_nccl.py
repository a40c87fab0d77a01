"""Two processes with a GPU each, over NCCL, are one process with one GPU, bit by bit."""

import os
import signal

import pytest
import torch
from fsdp_runs import F32, METHODS, make_base, make_model, parts_of, shard, train, values
from ranks import run_ranks
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA, quantise_, swap_
from deltadiff.diffora import Search, search, split
from deltadiff.errors import Interrupted
from deltadiff.ranks import whole

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("ignore:.*rounding"),
]
WAYS = {
    "FSDP2": shard,
    "DDP": lambda model: DistributedDataParallel(model, device_ids=[torch.cuda.current_device()]),
}


def trained(rank, method, way):
    """What a process has after some steps; without a rank, one that trains alone."""
    dtype, how = METHODS[method]
    model = make_model(dtype).cuda()
    if rank is not None:
        model = WAYS[way](model)
    train(model, DeltaLoRA(model, lr=5e-3, **how), rank, device="cuda")
    return values(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_two_gpus_are_one_bit_by_bit(method, way):
    first, second = run_ranks(trained, method, way, backend="nccl")
    assert first == second == trained(None, method, way)


def trained_over_fp8(rank, way):
    model = make_base(F32)
    quantise_(model, "fp8")
    swap_(model, r=8, lora_alpha=16, seed=1)
    model.cuda()
    if rank is not None:
        model = WAYS[way](model)
    optimizer = DeltaLoRA(model, lr=5e-3, w_update="factored")
    train(model, optimizer, rank, device="cuda")
    return values(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad))


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_are_one_over_fp8(way):
    first, second = run_ranks(trained_over_fp8, way, backend="nccl")
    assert first == second == trained_over_fp8(None, way)


# ----------------------------------------------------------------------- DiffoRA's search

EXAMPLES = torch.cat([parts_of(i, 1)[0] for i in range(4)])
SETTINGS = {"rounds": 8, "inner_steps": 2, "batch_size": 4, "progress": lambda *_: None}
PLACES = {
    "whole": None,
    "sharded": {},
    "sharded from the CPU": {},
    "offloaded": {"offload_policy": CPUOffloadPolicy()},
}


def new_search(place, rank):
    model = make_base(F32)
    if rank is None or place in ("whole", "sharded"):
        model.cuda()
    state = Search(model, r=2, lr=1e-3, gate_lr=1e-2, seed=0)
    if rank is not None and place != "whole":
        shard(model, **PLACES[place])
    return state


def searched(rank, place, folder=None, stop_at=None, **how):
    """What a search gives; ``stop_at``: after so many losses the second process gets a signal."""
    state, seen = new_search(place, rank), []

    def loss(indices):
        seen.append(indices)
        if rank == 1 and len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        ids = EXAMPLES[indices].cuda()
        return state.model(input_ids=ids, labels=ids).loss

    stopped = None
    try:
        search(state, loss, split(len(EXAMPLES)), folder=folder, **SETTINGS | how)
    except Interrupted as stop:
        stopped = stop.number
    trained = [whole(p).flatten().tolist() for p in state.trained.values()]
    losses = state.gate_losses, state.inner_losses
    return [state.logits.flatten().tolist(), *losses, *trained], stopped, (state.round, state.index)


def stopped_and_resumed(rank, place, folder):
    ended = searched(rank, place)
    stopped = searched(rank, place, folder, stop_at=5)
    return ended, stopped[1:], searched(rank, place, folder, resume=True)


@pytest.mark.parametrize("place", PLACES)
def test_two_gpus_search_as_one_and_go_on_bit_by_bit(place, tmp_path):
    first, second = run_ranks(stopped_and_resumed, place, tmp_path, backend="cpu:gloo,cuda:nccl")
    assert first == second
    ended, stopped, resumed = first
    assert ended == resumed and stopped == (signal.SIGTERM, (4, 0))  # step 10 reads the losses
    for ours, one in zip(ended[0], searched(None, place)[0], strict=True):
        assert ours == pytest.approx(one, rel=0, abs=1e-5)  # pairs move by 1e-2
