"""Devices: which are there, what they are, and what else a figure depends on."""

import gc
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .errors import ArgumentError


def free_memory(device: torch.device) -> None:
    """Give back what the last case or variant held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PACKAGES = ("triton", "transformers", "peft", "safetensors")


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
        "deltadiff": metadata.version("deltadiff"),
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


def default_device() -> str:
    """The name of a GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for, with its index; raises where there is none."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found = "cuda:0" if str(device) == "cuda" else str(device)
    if found not in there:
        raise ArgumentError("device", repr(str(device)), f"one of {', '.join(there)}")
    return torch.device(found)
