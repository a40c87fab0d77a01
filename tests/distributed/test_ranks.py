"""The processes that the tests of this folder run in."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from deltadiff.errors import ArgumentError
from deltadiff.ranks import Ranks


def add_up(rank, start):
    t = torch.tensor(float(start + rank))
    dist.all_reduce(t)
    return rank, t.item()


def fail_at_one(rank):
    if rank == 1:
        raise ValueError("no more")
    dist.barrier()


class Odd(Exception):
    """An error that cannot be sent, because it is made of another number of arguments."""

    def __init__(self, one, two):
        super().__init__(one)


def fail_together(rank):
    """What each process hears of an error in the second one, and whether all go on."""
    told, ranks = [], Ranks()
    for error in (ArgumentError("r", 0, "1"), Odd("no", "more")):
        with pytest.raises(Exception) as caught:
            with ranks.together():
                if rank == 1:
                    raise error
        told.append((type(caught.value).__name__, str(caught.value), str(caught.value.__cause__)))
    with ranks.together():
        pass
    return told, ranks.gather(rank), ranks.of_first(rank)


def test_what_each_rank_gave():
    assert run_ranks(add_up, 10, size=3) == [(0, 33.0), (1, 33.0), (2, 33.0)]


def test_the_failure_of_one_ends_the_others():
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2: .*ValueError: no more"):
        run_ranks(fail_at_one)


def test_an_error_in_one_is_raised_in_all():
    first, second = run_ranks(fail_together)
    cause = "process 1 of 2 raised this error"
    text = "r: got 0; accepted: 1"
    assert first[0] == [("ArgumentError", text, cause), ("RuntimeError", "Odd: no", cause)]
    assert second[0] == [("ArgumentError", text, "None"), ("Odd", "no", "None")]
    assert first[1:] == second[1:] == ([0, 1], 0)
