"""The table of launch configurations that `deltadiff tune` writes for a GPU."""

import json
from collections.abc import Iterable
from pathlib import Path

import triton

from ..errors import ArgumentError
from ..files import write_text
from ..kernels.launch_configs import LAUNCH_CONFIGS
from ..kernels.runtime import tuned
from ..kernels.runtime.tuned import Rows
from .sweep import Finding


def read(path: Path) -> Rows:
    """The rows of a table; none if there is no file.

    Raises:
        ArgumentError: the file is not a table.
    """
    try:
        return tuned.load(path)
    except tuned.TableError as error:
        accepted = "a table that can be read; `deltadiff tune --remove` deletes the user's"
        raise ArgumentError("table", error, accepted) from error


def keep(findings: Iterable[Finding], path: Path, gpu: str, rows: Rows, shipped: Rows) -> Rows:
    """Put findings into the table at ``path``, which is written again after every one.

    Args:
        findings: may still be being measured: an interrupted run keeps what it has.
        path: where the table is.
        gpu: the name of the GPU.
        rows: what the table holds already. A finding replaces the row of its launch.
        shipped: the rows that are installed for this GPU. Where the default beats one of them, an
            empty row says so.

    Returns:
        The rows of the table.
    """
    rows = dict(rows)
    found = set()  # two cases may ask for one configuration: what either of them found stays
    for finding in findings:
        if finding.launch not in found:
            rows.pop(finding.launch, None)
        if finding.entries or (finding.launch in shipped and finding.launch not in found):
            rows[finding.launch] = finding.entries
            found.add(finding.launch)
        write(path, gpu, rows)
    return rows


def write(path: Path, gpu: str, rows: Rows) -> None:
    """Write a table, all of it or nothing; its folder is made.

    Raises:
        ArgumentError: the file cannot be written.
    """
    lines = []
    for (op, key), entries in sorted(rows.items()):
        named = dict(zip(LAUNCH_CONFIGS[op].keys, key, strict=True))
        lines.append(json.dumps({"op": op, "key": named, "config": entries}))
    head = json.dumps({"version": tuned.VERSION, "gpu": gpu, "triton": triton.__version__})
    text = f'{head[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"  # one row per line
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        accepted = "a file that can be written"
        raise ArgumentError("--output", f"{path} ({error})", accepted) from error
