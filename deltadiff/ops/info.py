"""`deltadiff info`: versions, devices, and which backend runs what on this machine."""

import argparse
import json

import torch

from ..checks import DTYPES, dtype_name
from ..devices import _devices, _versions
from ..text import align_columns
from .dispatch import BACKENDS, choose_path, why_unavailable

LAYER = (1024, 1024, 8)  # out, in, r: a layer that every backend of `lora_linear` takes


def collect() -> dict:
    """What `format_info` prints, as JSON takes it."""
    return {"versions": _versions(), "devices": _devices(), "paths": _paths()}


def _paths() -> list[dict]:
    """One entry for each device, backend and dtype; ``reason`` is None where it can run."""
    paths = []
    for entry in _devices():
        device = torch.device(entry["device"])
        for backend in BACKENDS:
            for dtype in DTYPES:
                paths.append(
                    {
                        "device": entry["device"],
                        "backend": backend,
                        "dtype": dtype_name(dtype),
                        "chosen": _chosen(backend, device, dtype),
                        "reason": why_unavailable(backend, device, dtype),
                    }
                )
    return paths


def _chosen(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """For which operations ``backend`` is taken where none is asked for; None for none."""
    own, other = (choose_path(device, dtype, None, layer).backend for layer in (LAYER, None))
    if backend == own == other:
        return "all"
    return "lora_linear" if backend == own else "the others" if backend == other else None


def format_info(info: dict) -> str:
    """What `collect` found, as text."""
    versions = [(name, version or "-") for name, version in info["versions"].items()]
    devices = [("device", "name", "", "memory", "")]
    for d in info["devices"]:
        units = f"{d['threads']} threads" if "threads" in d else f"{d['multiprocessors']} SMs"
        row = (d["device"], d["name"], d["capability"], f"{d['memory_gib']} GiB", units)
        devices.append(row)
    if len(info["devices"]) == 1:
        build = info["versions"]["CUDA of torch"]
        why = "no NVIDIA GPU found" if build else "this torch is built without CUDA"
        devices.append(("cuda", f"- ({why})", "", "", ""))

    dtypes = list(dict.fromkeys(p["dtype"] for p in info["paths"]))
    table = [("device", "backend", *dtypes, "why not")]
    for device, backend in dict.fromkeys((p["device"], p["backend"]) for p in info["paths"]):
        row = [p for p in info["paths"] if (p["device"], p["backend"]) == (device, backend)]
        cells = ("-" if p["reason"] else _use(p["chosen"]) for p in row)
        reasons = dict.fromkeys(p["reason"] for p in row if p["reason"])
        table.append((device, backend, *cells, "; ".join(reasons)))
    return "\n\n".join(align_columns(rows) for rows in (versions, devices, table))


def _use(chosen: str | None) -> str:
    return {None: "there", "all": "chosen"}.get(chosen, f"chosen for {chosen}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option of `deltadiff info`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print what `collect` finds, as text or as JSON."""
    found = collect()
    print(json.dumps(found, indent=1) if args.json else format_info(found))
    return 0
