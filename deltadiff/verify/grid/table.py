"""The cells of `deltadiff verify --full` as a table."""

import torch

from ...text import align_columns
from .run import Cell

SHOWN = 5  # failed cases of a cell


def format_cells(cells: list[Cell], device: torch.device, seed: int) -> str:
    """One line for each operation, path and dtype, then the failures, and a line that counts."""
    table = [("operation", "path", "dtype", "cases", "failures", "worst", "")]
    for cell in cells:
        worst = "" if cell.worst_ratio is None else f"{cell.worst_ratio:.2f}"
        counts = (str(cell.cases), str(cell.failures)) if not cell.note else ("-", "-")
        table.append((cell.op, cell.path, cell.dtype, *counts, worst, cell.note))
    lines = [align_columns(table)]
    for cell in cells:
        for number, text, what in cell.failed[:SHOWN]:
            case = f"--device {device} --seed {seed} --op {cell.op} --case {number}"
            lines.append(f"NO  deltadiff verify --full {case}\n    {text}\n    {what}")
        if more := len(cell.failed) - SHOWN:
            lines += [f"    and {more} more of {cell.op} on {cell.path}"] if more > 0 else []
    cases, failures = (sum(getattr(cell, name) for cell in cells) for name in ("cases", "failures"))
    lines.append(f"{cases} cases, {failures} failed; seed {seed}")
    return "\n".join(lines)
