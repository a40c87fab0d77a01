"""What a measurement is: interleaved rounds, three quantiles, one flat record a variant."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deltadiff.info import environment

RESULTS = Path(__file__).parent / "results"
BUDGET_S = 1.0  # of timed calls, for all variants of a case together
ROUNDS = (5, 100)  # at least and at most
SHORT_S = 1e-3  # a call below this is timed in batches, the first after another variant is slow...
BATCH_S = 5e-3  # ...of about this long, so that neither that nor clock nor synchronisation counts


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


def write(records: list[dict], device: torch.device, stem: str | None = None) -> list[Path]:
    """One file for each operation (or all in one, STEM) and device: results/<op>-<device>.json."""
    RESULTS.mkdir(exist_ok=True)
    where = environment(device)
    slug = re.sub(r"[^a-z0-9]+", "-", where["gpu"].lower()).strip("-")
    files: dict[str, list[str]] = {}
    for r in records:  # a line a record: diffs stay small
        files.setdefault(stem or r["op"], []).append(json.dumps({**r, **where}))
    paths = [RESULTS / f"{name}-{slug}.json" for name in files]
    for path, lines in zip(paths, files.values(), strict=True):
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return paths
