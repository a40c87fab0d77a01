"""The tally: what the long form of the tests went through, for the table in benchmarks/README.md.

A test calls its fixture `tally`; the rows travel with the test's report, so that they also arrive
from the worker processes of pytest-xdist. `merge` adds up those that say the same of what they are
about.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

PROPERTY = "tally"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COUNTED = ("cases", "failures")  # these are added up; of worst_ratio the largest stays


def row(
    suite: str,
    op: str,
    cases: int,
    failures: int = 0,
    path: str = "cpu",
    dtype: str | None = None,
    worst_ratio: float | None = None,
) -> dict:
    """A row of the tally.

    Args:
        suite: what kind of test it was: "verify", "repeats", "sequences", "mutants" or "kills".
        op: what was tested, an operation or a few words.
        cases: how many cases ran.
        failures: how many of them went wrong.
        path: backend and device, as in "triton-cuda"; "cpu" where no backend was chosen.
        dtype: of the cases, if that matters.
        worst_ratio: the largest error over its limit.
    """
    head = {"op_suite": suite, "op": op, "path": path, "dtype": dtype}
    return head | {"cases": cases, "failures": failures, "worst_ratio": worst_ratio}


def subject(r: dict) -> tuple[str, ...]:
    """What a row is about."""
    return tuple(str(r[name]) for name in ("op_suite", "op", "path", "dtype"))


def merge(rows: Iterable[dict]) -> list[dict]:
    """One row for each suite, op, path and dtype, in this order."""
    merged: dict[tuple, dict] = {}
    for r in rows:
        key = subject(r)
        if key not in merged:
            merged[key] = dict(r)
            continue
        kept = merged[key]
        kept |= {name: kept[name] + r[name] for name in COUNTED}
        ratios = [x["worst_ratio"] for x in (kept, r) if x["worst_ratio"] is not None]
        kept["worst_ratio"] = max(ratios, default=None)
    return [merged[key] for key in sorted(merged)]


def describe(r: dict) -> str:
    """A row in words."""
    head = " ".join(str(r[name]) for name in ("op_suite", "op", "path", "dtype") if r[name])
    worst = "" if r["worst_ratio"] is None else f", worst {r['worst_ratio']:.3f} of its limit"
    return f"{head}: {r['cases']} cases, {r['failures']} failures{worst}"


def write(rows: Iterable[dict], seed: int, folder: Path = RESULTS) -> list[Path]:
    """Write merged rows to checks-<device>.json, with versions, commit and the first seed.

    A row that an earlier run left there stays unless this run has it anew.
    """
    # The tests import this file before they say that Triton shall interpret, which it must be told
    # before it is imported.
    from deltadiff.devices import environment
    from deltadiff.files import slug, write_records

    rows, paths = list(rows), []
    for device in ("cpu", "cuda"):
        mine = [r for r in rows if r["path"].endswith("cuda") == (device == "cuda")]
        if not mine:
            continue
        where = environment(torch.device(device))
        path = folder / f"checks-{slug(where['gpu'])}.json"
        earlier = json.loads(path.read_text()) if path.exists() else []
        found = {subject(r): r for r in earlier}
        found |= {subject(r): r | {"seed": seed} | where for r in mine}
        write_records(path, [found[k] for k in sorted(found)])
        paths.append(path)
    return paths
