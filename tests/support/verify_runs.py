"""Quick runs of `deltadiff verify` on the CPU, for tests that make an operation wrong."""

import torch

from deltadiff.checks import dtype_name
from deltadiff.verify.run import run
from deltadiff.verify.tolerance import Row

SEED = 7


def failed(op: str, **options) -> list[Row]:
    """The rows of a quick run that did not pass."""
    rows, ok = run("cpu", [op], quick=True, seed=SEED, **options)
    wrong = [row for row in rows if not row.ok]
    assert ok == (not wrong)
    return wrong


def names(rows: list[Row]) -> set[str]:
    return {row.output for row in rows}


def limits(op: str, output: str) -> dict[str, float]:
    """The largest limit of an output by dtype, for the operation as it is."""
    found: dict[str, float] = {}
    for row in run("cpu", [op], quick=True, seed=SEED)[0]:
        if row.output.endswith(output) and row.worst is not None:
            found[row.dtype] = max(found.get(row.dtype, 0), row.limit)
    return found


def nudge(t: torch.Tensor, limit: dict[str, float]) -> torch.Tensor:
    """``t``, wrong by one and a half limits in relative norm, or in float64 by an ulp."""
    factor = 1 + max(1.5 * limit[dtype_name(t.dtype)], torch.finfo(t.dtype).eps)
    return (t.double() * factor).to(t.dtype) if t.dtype != torch.float64 else t * factor
