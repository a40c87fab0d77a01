"""What a measurement is: interleaved rounds, three quantiles, one flat record a variant."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 1.0  # of timed calls, for all variants of a case together
ROUNDS = (5, 100)  # at least and at most
SHORT_S = 100e-6  # a call below this is timed in batches...
BATCH_S = 1e-3  # ...of about this long, so that neither clock nor synchronisation counts


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable, calls: int, device: torch.device) -> float:
    """Seconds of one call, from a batch of them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def graphed(call: Callable) -> Callable:
    """``call`` as a CUDA graph: the time of the GPU without that of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_mib(call: Callable, device: torch.device) -> float | None:
    """What a call allocates beyond what was there; known on CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def measure(benchmark, variants: dict[str, Callable], device: torch.device) -> dict[str, list]:
    """Seconds a call, for each variant: every round times each of them once, in turn.

    Clocks drift within minutes; variants that take turns drift together.
    """
    calls = {}
    for name, call in variants.items():
        call()
        once = min(timed(call, 1, device) for _ in range(2))
        calls[name] = (1 if once >= SHORT_S else int(BATCH_S / once) + 1, once)
    round_s = sum(count * once for count, once in calls.values())
    seconds = {name: [] for name in variants}

    def one_round():
        for name, call in variants.items():
            seconds[name].append(timed(call, calls[name][0], device))

    rounds = min(max(int(BUDGET_S / round_s), ROUNDS[0]), ROUNDS[1])
    benchmark.pedantic(one_round, rounds=rounds)
    return seconds


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def records(
    seconds: dict[str, list], peaks: dict[str, float | None], floor: str, **case
) -> list[dict]:
    """One flat record a variant. ``over_floor``: how often the floor's median fits into its own."""
    floor_ms = quantile(seconds[floor], 0.5) * 1e3
    found = []
    for variant, values in seconds.items():
        p20, p50, p80 = (round(quantile(values, q) * 1e3, 6) for q in (0.2, 0.5, 0.8))
        times = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "over_floor": p50 / floor_ms}
        found.append({**case, "variant": variant, **times, "peak_mib": peaks[variant]})
    return found


def environment(device: torch.device) -> dict:
    """What a figure depends on beside the code, and the code."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "gpu": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": output_of("git", "-C", str(RESULTS.parent), "rev-parse", "HEAD") or "unknown",
    }


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU where that is what runs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def driver_version() -> str | None:
    found = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(all_records: list[dict], device: torch.device) -> list[Path]:
    """One file for each operation and device: results/<op>-<device>.json."""
    RESULTS.mkdir(exist_ok=True)
    where = environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
    paths = []
    for op in sorted({record["op"] for record in all_records}):
        lines = [json.dumps({**r, **where}) for r in all_records if r["op"] == op]
        paths.append(RESULTS / f"{op}-{slug}.json")
        paths[-1].write_text(
            "[\n" + ",\n".join(lines) + "\n]\n"
        )  # a line a record: diffs stay small
    return paths
