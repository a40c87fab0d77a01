"""Devices: which there are, what they are, and on what else a measured figure depends."""

import functools
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
    """Free what nobody refers to any more, on the host and on ``device``."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


PACKAGES = ("triton", "transformers", "peft", "safetensors")


def environment(device: torch.device) -> dict:
    """What a measured figure depends on beside its settings, as one flat dict for its record."""
    versions = package_versions()
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "driver": versions["NVIDIA driver"] if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        **{name: versions[name] for name in ("torch", "triton", "transformers", "python")},
        "commit": commit(),
    }


def commit() -> str | None:
    """The git commit of the running source, with "+" if files differ from it; None without git.

    Results that were measured before do not count: they change nothing of what runs.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    status = ["status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results"]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        state = subprocess.run([*git, *status], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if state.stdout else "") if head.returncode == 0 else None


def package_versions() -> dict[str, str | None]:
    """Versions by name, of all that the kernels run on; None for what is not installed."""
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


@functools.cache
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


def list_devices() -> list[dict]:
    """The CPU, then each GPU: name, capability, memory and number of threads or processors."""
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
    """ "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(device: str | torch.device) -> torch.device:
    """The device of that name, with its index; ArgumentError if there is none here."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found = "cuda:0" if str(device) == "cuda" else str(device)
    if found not in there:
        raise ArgumentError("device", repr(str(device)), f"one of {', '.join(there)}")
    return torch.device(found)
