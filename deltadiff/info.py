"""`deltadiff info`: versions, devices, and which backend runs what on this machine."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from . import __version__
from .checks import DTYPES
from .paths import BACKENDS, choose_path, why_unavailable

PACKAGES = ("triton", "transformers", "peft", "safetensors")
LAYER = (1024, 1024, 8)  # out, in, r: a layer that every backend of `lora_linear` takes


def collect() -> dict:
    """What `format_info` prints, as JSON takes it."""
    return {"versions": _versions(), "devices": _devices(), "paths": _paths()}


def environment(device: torch.device) -> dict:
    """What a figure depends on beside the settings, flat, for a record of it."""
    versions = _versions()
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "driver": versions["NVIDIA driver"] if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **{name: versions[name] for name in ("torch", "triton", "transformers", "python")},
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the source that runs, with "+" where it was changed since; None where git has none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if state.stdout else "") if head.returncode == 0 else None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "deltadiff": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["CUDA of torch"] = torch.version.cuda
    versions["NVIDIA driver"] = _driver()
    return versions


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.partition("\n")[0].strip() or None


def _devices() -> list[dict]:
    cpu = {
        "device": "cpu",
        "name": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "device": f"cuda:{i}",
                "name": gpu.name,
                "capability": f"sm_{gpu.major}{gpu.minor}",
                "multiprocessors": gpu.multi_processor_count,
                "memory_gib": round(gpu.total_memory / 2**30, 1),
            }
        )
    return [cpu, *gpus]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
                        "dtype": str(dtype).removeprefix("torch."),
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
    return "\n\n".join(_align(rows) for rows in (versions, devices, table))


def _use(chosen: str | None) -> str:
    return {None: "there", "all": "chosen"}.get(chosen, f"chosen for {chosen}")


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
