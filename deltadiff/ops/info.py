"""`deltadiff info`: versions, devices, and which kernels run what on this machine."""

import argparse
import json

import torch

from ..checks import DTYPES, dtype_name
from ..devices import list_devices, package_versions
from ..text import align_columns
from .backends import BACKENDS, why_unavailable
from .dispatch import choose_path

LAYER = (1024, 1024, 8)  # out, in, r: a layer that every kernel of `lora_linear` takes


def collect() -> dict:
    """What `format_info` prints, in a form that JSON takes."""
    found = list_devices()
    names = [device["device"] for device in found]
    return {
        "versions": package_versions(),
        "devices": found,
        "paths": _paths(names),
        "lora_linear": _runs(names),
    }


def _paths(devices: list[str]) -> list[dict]:
    """One entry for each device, backend and dtype; ``reason`` is None where it can run."""
    return [
        {
            "device": name,
            "backend": backend,
            "dtype": dtype_name(dtype),
            "chosen": _chosen(backend, torch.device(name), dtype),
            "reason": why_unavailable(backend, torch.device(name), dtype),
        }
        for name in devices
        for backend in BACKENDS
        for dtype in DTYPES
    ]


def _runs(devices: list[str]) -> list[dict]:
    """What runs `lora_linear` of `LAYER`: one entry for each device and dtype."""
    entries = []
    for name in devices:
        for dtype in DTYPES:
            chosen = choose_path(torch.device(name), dtype, None, LAYER)
            kernels = [
                {
                    "from_tokens": run.tokens.start,
                    "kernel": run.kernel.name,
                    "backend": run.kernel.backend,
                    "reason": run.reason,
                }
                for run in chosen.runs
            ]
            entry = {"device": name, "dtype": dtype_name(dtype), "layer": list(LAYER)}
            entries.append(entry | {"kernels": kernels, "in_words": chosen.in_words()})
    return entries


def _chosen(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """For which operations ``backend`` is chosen if none is asked for; None for none."""
    own, other = (choose_path(device, dtype, None, layer).backend for layer in (LAYER, None))
    if backend == own == other:
        return "all"
    return "lora_linear" if backend == own else "the others" if backend == other else None


def format_info(info: dict) -> str:
    """What `collect` found, as tables."""
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
        paths = [p for p in info["paths"] if (p["device"], p["backend"]) == (device, backend)]
        cells = ("-" if p["reason"] else _use(p["chosen"]) for p in paths)
        reasons = dict.fromkeys(p["reason"] for p in paths if p["reason"])
        table.append((device, backend, *cells, "; ".join(reasons)))
    tables = versions, devices, _runs_table(info["lora_linear"]), table
    return "\n\n".join(align_columns(rows) for rows in tables)


def _runs_table(entries: list[dict]) -> list[tuple[str, ...]]:
    """One row for each device and what runs there, with the dtypes for which it runs."""
    out, k, r = LAYER
    dtypes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        dtypes.setdefault((entry["device"], entry["in_words"]), []).append(entry["dtype"])
    rows = [(device, ", ".join(names), words) for (device, words), names in dtypes.items()]
    return [("device", "dtypes", f"lora_linear ({out} x {k}, rank {r}) runs"), *rows]


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
