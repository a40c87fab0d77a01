"""Functions that run in several processes of one process group, for tests.

The processes are forked from one that has imported everything and done nothing, so that starting
them takes a moment. They talk by gloo on the CPU, or by NCCL with one GPU each, and find the
environment variables that torchrun sets.
"""

import inspect
import multiprocessing
import os
import runpy
import tempfile
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds, of a whole run
IMPORTED = ["torch", "torch.distributed.fsdp", "transformers", "peft", "deltadiff"]


def short_form(cases: Iterable, *short: object) -> list:
    """Parameters of a test: of all ``cases``, those that are not ``short`` are of the long form.

    Several processes and their model take seconds, so `make test` has one case of each kind.
    """
    return [case if case in short else pytest.param(case, marks=pytest.mark.long) for case in cases]


def run_ranks(function: Callable, *args, size: int = 2, backend: str = "gloo") -> list:
    """``function(rank, *args)`` in each process of a new group; returns what each gave, by rank.

    The function lies at the top of a file, and what it takes and gives can be pickled. Where one
    process fails, the others are ended, and its traceback is raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    place = inspect.getfile(function), function.__name__  # pytest's names of modules are its own
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            work = (theirs, place, args, rank, size, backend, f"file://{folder}/store")
            processes.append(context.Process(target=_in_group, args=work, daemon=True))
            processes[-1].start()
            theirs.close()
            ends.append(mine)
        try:
            return _collect(ends)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(ends: list[Connection]) -> list:
    results: dict[int, object] = {}
    while len(results) < len(ends):
        ready = wait([end for i, end in enumerate(ends) if i not in results], TIMEOUT)
        if not ready:
            missing = sorted(set(range(len(ends))) - results.keys())
            raise AssertionError(f"ranks {missing} gave nothing in {TIMEOUT:.0f} s")
        for end in ready:
            rank = ends.index(end)
            try:
                results[rank], failure = end.recv()
            except EOFError:
                failure = "it ended without a word"
            if failure:
                raise AssertionError(f"rank {rank} of {len(ends)}: {failure}")
    return [results[rank] for rank in range(len(ends))]


def _in_group(end, place, args, rank, size, backend, store) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in places.items()} | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",  # nobody connects: a group is there
    }  # fmt: skip
    result = failure = None
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        limit = timedelta(seconds=TIMEOUT)
        dist.init_process_group(
            backend, init_method=store, rank=rank, world_size=size, timeout=limit
        )
        result = runpy.run_path(place[0])[place[1]](rank, *args)
        dist.barrier()
    except BaseException:
        failure = traceback.format_exc()
    end.send((result, failure))
    if failure is None:
        dist.destroy_process_group()
