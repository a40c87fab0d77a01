"""Clocks for one call: its time on the device and on the host, and the memory that it allocates."""

import functools
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**29  # many times the largest L2 cache: reading it gives the host 0.1 ms or more
HOST_CALLS = 15
CALLS_IN_QUEUE = 5  # far fewer launches than the queue takes

Call = Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, calls: int, device: torch.device, flush: bool = True) -> list[float]:
    """Seconds of each of ``calls`` calls on a GPU; on a CPU their mean, as a list of one.

    On a GPU each call stands between two events. With ``flush`` a buffer larger than the L2 cache
    is read before it: the call finds its inputs in memory, and the host has time to get ahead.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return [(time.perf_counter() - start) / calls]
    pairs = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            # Read, not written: writing the lines back would count as time of the call.
            _flush_buffer(device).sum()
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def time_steps(
    step: Call,
    steps: int,
    device: torch.device,
    warm_up: int = 1,
    seconds: Callable[[Call], float] | None = None,
) -> tuple[list[float], float | None]:
    """Seconds of each of ``steps`` steps, and the MiB that are allocated at their peak on a GPU.

    Steps are so long that neither the host nor the L2 cache matters.

    Args:
        warm_up: how many steps run before.
        seconds: times one step; None is the clock of this process alone.
    """
    for _ in range(warm_up):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(steps):
        times += sample(step, 1, device, flush=False) if seconds is None else [seconds(step)]
    if device.type != "cuda":
        return times, None
    return times, torch.cuda.max_memory_allocated(device) / 2**20


@functools.lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=device)


def host_ms(call: Call, device: torch.device) -> float | None:
    """Median of the milliseconds that the host needs to issue a call; None on a CPU.

    The GPU's queue has room, and each timed call follows another one, as in training. The first
    call after a wait for the GPU also has to wake it, so it is not timed.
    """
    if device.type != "cuda":
        return None
    times = []
    for i in range(HOST_CALLS):
        if i % CALLS_IN_QUEUE == 0:
            torch.cuda.synchronize(device)
            call()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(times) * 1e3


def graphed(call: Call) -> Call:
    """``call`` captured in a CUDA graph: replaying it takes the time of the GPU alone."""
    # The warm-up uses the capture's stream, because some libraries keep a workspace per stream.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay() -> None:
        graph.replay()
        _ = call  # keeps the tensors alive that the graph reads

    return replay


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that a call allocates at its peak beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
