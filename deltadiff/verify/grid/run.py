"""Runs random calls of every operation on every path, and adds up what they find."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from ...checks import dtype_name
from ...errors import ArgumentError
from ..tolerance import Case, Row
from .adamw_step import adamw_step_rows
from .delta_update import delta_update_rows
from .derivatives import derivative_rows
from .draws import Draw, costs_of
from .gated_mlp import gated_mlp_rows
from .lora_linear import lora_linear_rows
from .paths import PATHS, backend_of, dtypes_of, why_not
from .quantised import decode_4bit_rows, decode_fp8_rows
from .step_counters import step_counters_rows

GRID: dict[str, Callable[..., Iterator[Row]]] = {
    "lora_linear": lora_linear_rows,
    "decode_4bit": decode_4bit_rows,
    "decode_fp8": decode_fp8_rows,
    "gated_mlp": gated_mlp_rows,
    "derivatives": derivative_rows,
    "delta_update": delta_update_rows,
    "adamw_step": adamw_step_rows,
    "step_counters": step_counters_rows,
}
CASES = 504  # of an operation on a path, over all dtypes
MOST_WORKERS = 16  # each takes some memory of a GPU
NUMBERS = 1000  # the numbers of a cell's cases begin at a multiple of this


class Group(NamedTuple):
    """The cases of one operation, path and pair of dtypes; ``first`` is the number of the first."""

    op: str
    path: str
    dtypes: tuple[torch.dtype, torch.dtype]
    first: int

    @property
    def dtype(self) -> str:
        return "/".join(dict.fromkeys(map(dtype_name, self.dtypes)))


@dataclass
class Cell:
    """What the cases of one group found.

    Attributes:
        worst_ratio: the largest error over its limit; None where only bits were compared.
        note: why the path is not here, where it is not.
        failed: the number, the text and the failed checks of each case that failed.
    """

    op: str
    path: str
    dtype: str
    cases: int = 0
    failures: int = 0
    worst_ratio: float | None = None
    note: str = ""
    failed: list[tuple[int, str, str]] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {"op_suite": "verify", **asdict(self)}


def groups_of(op: str) -> list[Group]:
    """All groups of an operation, those too whose path is not on this machine."""
    pairs = [(path, dtypes) for path in PATHS[op] for dtypes in dtypes_of(op, path)]
    return [Group(op, *pair, NUMBERS * i) for i, pair in enumerate(pairs)]


def run_grid(
    device: torch.device,
    seed: int,
    ops: Sequence[str] | None = None,
    backend: str | None = None,
    cases: int = CASES,
    workers: int | None = None,
) -> list[Cell]:
    """Run random calls on ``device``, and return a cell for each operation, path and dtype.

    Args:
        seed: determines the cases.
        ops: names from `GRID`; None is all of them.
        backend: only paths of this backend; None is all that are here.
        cases: of an operation on a path, over all of its dtypes.
        workers: how many processes share the work; 1 is this process, None is one for each CPU.
    """
    jobs, cells = [], {}
    for op in GRID if ops is None else ops:
        for group in groups_of(op):
            if backend in (None, backend_of(group.path)):
                note = why_not(op, group.path, device, group.dtypes[0]) or ""
                cells[group] = Cell(op, group.path, group.dtype, note=note)
    here = [group for group, cell in cells.items() if not cell.note]
    for group in here:
        dtypes = sum((other.op, other.path) == (group.op, group.path) for other in here)
        parts = _parts(-(-cases // dtypes), 10 if workers != 1 else 1)
        jobs += [(group, part) for part in parts]
    for (group, part), found in zip(jobs, _run_jobs(jobs, device, seed, workers), strict=True):
        _add(cells[group], found, len(part))
    return list(cells.values())


def run_number(device: torch.device, seed: int, op: str, number: int) -> list[Row]:
    """The rows of one case, by the number that a failure names."""
    for group in groups_of(op):
        if group.first == number // NUMBERS * NUMBERS:
            if reason := why_not(op, group.path, device, group.dtypes[0]):
                raise ArgumentError("case", number, f"a case of a path that is here: {reason}")
            return _run_case(group, number - group.first, device, seed)[1]
    raise ArgumentError("case", number, f"a case of {op}, below {len(groups_of(op)) * NUMBERS}")


def _run_case(group: Group, i: int, device: torch.device, seed: int) -> tuple[str, list[Row]]:
    names = f"{seed} {group.op} {group.path} {group.dtype}"
    interpreted = backend_of(group.path) == "triton" and device.type == "cpu"
    draw = Draw(names, i, costs_of(device, interpreted))
    case = Case(group.op, group.dtype, f"{group.first + i}", group.path, device, seed)
    case.why_not = ""  # `why_not` has been asked
    rows = list(case.guard(GRID[group.op], draw, group.path, group.dtypes))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other workers have no memory but that of the same GPU
    return case.shape, rows


def _parts(count: int, parts: int) -> list[range]:
    """0 to ``count`` in some ranges. With all cases of a kind in one, each kind compiles once."""
    return [range(i, count, parts) for i in range(min(parts, count))]


def _run_part(
    group: Group, part: range, device: torch.device, seed: int
) -> list[tuple[int, str, list[Row]]]:
    return [(group.first + i, *_run_case(group, i, device, seed)) for i in part]


def _run_jobs(jobs: list, device: torch.device, seed: int, workers: int | None) -> Iterator[list]:
    """What each job finds, in the order of the jobs."""
    workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    if workers == 1:
        yield from (_run_part(*job, device, seed) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    pool = ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(_run_part, *zip(*((*job, device, seed) for job in jobs), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _add(cell: Cell, found: list[tuple[int, str, list[Row]]], cases: int) -> None:
    cell.cases += cases
    for number, text, rows in found:
        ratios = [r for row in rows if row.limit for r in (row.error / row.limit, row.worst)]
        cell.worst_ratio = max(
            [r for r in (*ratios, cell.worst_ratio) if r is not None], default=None
        )
        wrong = [row for row in rows if not row.ok]
        if wrong or not rows:
            cell.failures += 1
            what = "; ".join(f"{row.output}: {row.note or _figures(row)}" for row in wrong)
            cell.failed.append((number, text, what or "nothing was checked"))


def _figures(row: Row) -> str:
    numbers = {"error": row.error, "limit": row.limit, "worst": row.worst}
    return ", ".join(f"{name} {n:.2e}" for name, n in numbers.items() if n is not None)
