"""Records: the figures of one variant as a flat dict, and the JSON files that hold them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..devices import environment
from ..files import slug, write_records

OUT_OF_MEMORY = "out of memory"


@dataclass
class Timing:
    """The measurements of one variant. If it failed, there are none, and ``note`` says why."""

    seconds: list[float] = field(default_factory=list)
    host_ms: float | None = None
    peak_mib: float | None = None
    note: str | None = None


def record(fields: Mapping, variant: str, timing: Timing, floor: Sequence[float]) -> dict:
    """``fields`` with the variant's name, quantiles of its time, host time and memory.

    ``over_floor`` is its median time over the median of ``floor``, which is in seconds.
    """
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "over_floor"))
    if timing.seconds:
        for q in (20, 50, 80):
            times[f"p{q}_ms"] = round(_quantile(timing.seconds, q / 100) * 1e3, 6)
        if floor:
            ratio = statistics.median(timing.seconds) / statistics.median(floor)
            times["over_floor"] = round(ratio, 4)
    own = {"host_ms": timing.host_ms, "peak_mib": timing.peak_mib, "note": timing.note}
    own = {k: round(v, 4) if isinstance(v, float) else v for k, v in own.items()}
    return {**fields, "variant": variant, **times, **own}


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def failure(error: Exception) -> str:
    """The note of a variant that raised ``error``."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def failed(r: Mapping) -> bool:
    """Whether a variant failed for another reason than memory, which some cases may lack."""
    return r["note"] not in (None, OUT_OF_MEMORY)


def write(
    records: Sequence[Mapping], folder: Path, device: torch.device, stem: str | None = None
) -> list[Path]:
    """Write a file <op>-<device>.json for each op, or <stem>-<device>.json for all of them.

    Each record also gets the name of the device, the driver, the versions and the commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = environment(device)
    files: dict[Path, list[dict]] = {}
    for r in records:
        path = folder / f"{stem or r['op']}-{slug(where['gpu'])}.json"
        files.setdefault(path, []).append({**r, **where})
    for path, content in files.items():
        write_records(path, content)
    return list(files)
