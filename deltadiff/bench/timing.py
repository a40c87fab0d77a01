"""What a measurement is: variants that take turns, three quantiles, one flat record a variant.

Clocks drift by a tenth within minutes, so every round times each variant of a case, the floor among
them, and medians are compared. On a GPU each call stands between two events, and before it a buffer
larger than the L2 cache is read: the call finds its inputs in memory, and the host has time to get
ahead. What the host needs to issue a call is timed apart.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..devices import environment
from ..files import slug
from ..text import align_columns

BUDGET_S = 0.7  # of timed rounds, for all variants of a case together


QUICK_BUDGET_S = 0.1


ROUNDS = (5, 100)  # at least and at most


TURN_S = 5e-3  # of one variant within a round


SHORT_S = 1e-3  # a call on the CPU below this is timed in batches: the first of a turn is slow


FLUSH_BYTES = 2**29  # many times the largest L2 cache: reading it gives the host 0.1 ms or more


HOST_CALLS = 15


CALLS_IN_QUEUE = 5  # far fewer launches than the queue takes


Call = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    """``make`` prepares a variant and returns the call to time; ``fields`` are its record's own.

    ``capture``: False for one that a CUDA graph would make slower.
    """

    make: Callable[[], Call]
    fields: Mapping = field(default_factory=dict)
    capture: bool = True


@dataclass(frozen=True)
class Case:
    """One computation in several variants.

    ``fields`` (op, mode, graph, shape, dtype, ...) go into the record of every variant.
    ``build`` makes the inputs on a device and returns the variants by name, ``floor`` first.
    """

    fields: Mapping
    floor: str
    build: Callable[[torch.device], dict[str, Variant]]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.fields["op"], shape_text(self.fields), case_text(self))))


@dataclass
class Timing:
    """What was measured of one variant. ``note`` says why there is nothing."""

    seconds: list[float] = field(default_factory=list)
    host_ms: float | None = None
    peak_mib: float | None = None
    note: str | None = None


def compare(
    case: Case,
    device: torch.device,
    wanted: Collection[str] | None = None,
    budget_s: float = BUDGET_S,
    repeat: Callable[[Call, int], object] | None = None,
) -> list[dict]:
    """Measure a case; one record a variant.

    A variant that fails, for want of memory or else, is a record without times whose note says why.

    Args:
        case: what to measure.
        device: where.
        wanted: names of variants; None is all. The floor is always there.
        budget_s: seconds that the rounds may take together.
        repeat: called as repeat(one_round, rounds) instead of a loop, for pytest-benchmark.
    """
    variants = case.build(device)
    if wanted is not None:
        variants = {n: v for n, v in variants.items() if n in wanted or n == case.floor}
    timings = {name: Timing() for name in variants}
    turns: dict[str, tuple[Call, int]] = {}
    for name, variant in variants.items():
        try:
            turns[name] = _prepare(variant, case.fields["graph"], device, timings[name])
        except Exception as error:  # a peer that fails must not cost the others their figures
            timings[name].note = failure(error)

    def one_round() -> None:
        for name, (call, calls) in turns.items():
            timings[name].seconds += sample(call, calls, device)

    if turns:
        start = time.perf_counter()
        one_round()
        rounds = int(budget_s / (time.perf_counter() - start))
        for timing in timings.values():
            timing.seconds.clear()
        rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
        if repeat is None:
            for _ in range(rounds):
                one_round()
        else:
            repeat(one_round, rounds)
    floor = timings[case.floor].seconds
    return [
        record({**case.fields, **variants[name].fields}, name, timing, floor)
        for name, timing in timings.items()
    ]


def failure(error: Exception) -> str:
    """The note of a variant that raised ``error``."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def _prepare(variant: Variant, graph: bool, device: torch.device, timing: Timing):
    """(call, calls a turn), warm; peak memory and host time go into ``timing``."""
    call = variant.make()
    for _ in range(2):
        call()
    timing.peak_mib = peak_mib(call, device)
    if graph and variant.capture:
        call = graphed(call)
    timing.host_ms = host_ms(call, device)
    once = min(sample(call, 2, device))
    if device.type == "cuda":
        return call, max(1, min(10, int(TURN_S / once)))
    return call, 1 if once >= SHORT_S else int(TURN_S / once) + 1


# ----------------------------------------------------------------------- clocks


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Call, calls: int, device: torch.device, flush: bool = True) -> list[float]:
    """Seconds of each of some calls (GPU), or of one call by the mean of them (CPU)."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return [(time.perf_counter() - start) / calls]
    pairs = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            _flush_buffer(device).sum()  # by reading: lines written would be timed going back
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


@functools.lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLUSH_BYTES // 4, device=device)


def host_ms(call: Call, device: torch.device) -> float | None:
    """Median time that the host needs to issue a call, with room in the GPU's queue.

    As in training, where a call comes right after another: the first one after a wait for the GPU
    pays for waking it, and is not counted.
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
    """``call`` as a CUDA graph: the time of the GPU without that of the host."""
    stream = torch.cuda.Stream()  # one for both, so that what is cached by stream stays warm
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay() -> None:  # holds `call`, and so the tensors that the graph reads
        graph.replay()
        _ = call

    return replay


def peak_mib(call: Call, device: torch.device) -> float | None:
    """What a call allocates beyond what was there; known on CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


# ---------------------------------------------------------------------- records


def record(fields: Mapping, variant: str, timing: Timing, floor: list[float]) -> dict:
    """A flat record. ``over_floor``: the median over that of the floor, both in seconds."""
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "over_floor"))
    if timing.seconds:
        for q in (20, 50, 80):
            times[f"p{q}_ms"] = round(quantile(timing.seconds, q / 100) * 1e3, 6)
        if floor:
            ratio = statistics.median(timing.seconds) / statistics.median(floor)
            times["over_floor"] = round(ratio, 4)
    own = {"host_ms": timing.host_ms, "peak_mib": timing.peak_mib, "note": timing.note}
    own = {k: round(v, 4) if isinstance(v, float) else v for k, v in own.items()}
    return {**fields, "variant": variant, **times, **own}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def write(
    records: list[dict], folder: Path, device: torch.device, stem: str | None = None
) -> list[Path]:
    """One file for each op (or all in one, ``stem``) and device: <op>-<device>.json in ``folder``.

    Every record gets the device, driver, versions and commit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = environment(device)
    files: dict[str, list[str]] = {}
    for r in records:  # a line a record: diffs stay small
        files.setdefault(stem or r["op"], []).append(json.dumps({**r, **where}))
    paths = [folder / f"{name}-{slug(where['gpu'])}.json" for name in files]
    for path, lines in zip(paths, files.values(), strict=True):
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    return paths


# ------------------------------------------------------------------------- text


def shape_text(fields: Mapping) -> str:
    """8192x4096x11008 r16 (tokens x in x out), or 64 x 4096x4096 r8 (weights x in x out)."""
    shape = fields["shape"]
    sizes = "x".join(str(shape[key]) for key in ("M", "K", "N") if shape.get(key) is not None)
    layers = f"{shape['layers']} x" if shape.get("layers") else ""
    tensors = f"{shape['tensors']} factors of" if shape.get("tensors") else ""
    rank = f"r{shape['r']}" if shape.get("r") else ""
    return " ".join(filter(None, (tensors, layers, fields.get("model"), sizes, rank)))


def case_text(case: "Case | Mapping") -> str:
    """Dtype, mode, rounding and what else tells cases of one shape apart."""
    fields = case.fields if isinstance(case, Case) else case
    words = [fields["dtype"], fields["mode"], fields.get("targets"), fields.get("rounding")]
    words += ["yields the delta" * bool(fields.get("delta"))]
    words += ["graph" * bool(fields["graph"]), "checkpointing" * bool(fields.get("checkpointing"))]
    return " ".join(word for word in words if word)


def format_table(records: list[dict]) -> str:
    """The records as text, a line each, and a line of notes where a variant has no figures."""
    head = ("op", "shape", "case", "variant", "p20 ms", "p50 ms", "p80 ms", "x floor", "host ms")
    rows, notes = [(*head, "MiB")], []
    for r in records:
        names = [r["op"], shape_text(r), case_text(r), variant_text(r)]
        numbers = [r[key] for key in ("p20_ms", "p50_ms", "p80_ms")]
        cells = [f"{n:.3f}" if n is not None else "-" for n in numbers]
        for key, spec in (("over_floor", ".2f"), ("host_ms", ".3f"), ("peak_mib", ".1f")):
            cells.append(format(r[key], spec) if r[key] is not None else "-")
        rows.append((*names, *cells))
        if r["note"]:
            notes.append(f"{' '.join(names)}: {r['note']}")
    return "\n".join([align_columns(rows, right=range(4, len(rows[0]))), *notes])


def variant_text(r: Mapping) -> str:
    """Variant and method, the latter where a record has one (op "model")."""
    return " ".join(filter(None, (r["variant"], r.get("method"))))
