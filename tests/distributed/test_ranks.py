"""The processes that the tests of this folder run in."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks


def add_up(rank, start):
    t = torch.tensor(float(start + rank))
    dist.all_reduce(t)
    return rank, t.item()


def fail_at_one(rank):
    if rank == 1:
        raise ValueError("no more")
    dist.barrier()


def test_what_each_rank_gave():
    assert run_ranks(add_up, 10, size=3) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_the_failure_of_one_ends_the_others():
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2: .*ValueError: no more"):
        run_ranks(fail_at_one)
