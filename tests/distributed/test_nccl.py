"""Two processes with a GPU each, over NCCL, are one process with one GPU, bit by bit."""

import pytest
import torch
from fsdp_runs import METHODS, make_model, shard, train, values
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA

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
