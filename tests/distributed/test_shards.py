"""Sharded tensors in an optimizer: what `fully_shard` makes, and whole factors from their parts."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from deltadiff.errors import ArgumentTypeError
from deltadiff.optim.shards import WholeFactors, check_shards
from deltadiff.ranks import first_row, is_sharded, local, whole

SHAPES = [(8, 5), (3, 4), (1, 6)]  # the last two leave some processes without a row


def gather_twice(rank, dtype):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    wholes = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    sharded = [distribute_tensor(t.clone(), mesh, [Shard(0)]) for t in wholes]
    deltas = [local(t).float() * 2 for t in sharded]
    factors = WholeFactors(sharded, deltas)
    equal = []
    for _ in range(2):
        factors()
        equal += map(torch.equal, factors.wholes, wholes)
        equal += map(torch.equal, factors.deltas, [t.float() * 2 for t in wholes])
        for t, mine in zip(wholes, (*sharded, *deltas), strict=False):
            t.mul_(4)
            local(mine).mul_(4)
        for delta in deltas:
            delta.mul_(4)
    return equal


def placements(rank):
    mesh = init_device_mesh("cpu", (2, 1))
    t = torch.zeros(4, 4)
    for placement in ((Shard(0), Replicate()), (Replicate(), Shard(0))):
        check_shards("W", distribute_tensor(t, mesh, placement))
    for placement in ((Replicate(), Replicate()), (Shard(1), Replicate()), (Shard(0), Shard(0))):
        with pytest.raises(ArgumentTypeError, match="W: got a DTensor with placements"):
            check_shards("W", distribute_tensor(t, mesh, placement))
    by_rows = distribute_tensor(t, mesh, (Shard(0), Replicate()))
    assert whole(by_rows).equal(t) and first_row(by_rows) == 2 * rank and first_row(t) == 0
    return is_sharded(by_rows), is_sharded(t), local(t) is t, tuple(local(by_rows).shape)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_factors_from_their_parts(size, dtype):
    assert run_ranks(gather_twice, dtype, size=size) == [[True] * 12] * size


def test_placements_that_are_taken():
    assert run_ranks(placements) == [(True, False, True, (2, 4))] * 2
