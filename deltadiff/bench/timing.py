"""How a case is measured: its variants take turns, and each becomes one flat record.

Clock rates drift by a tenth within minutes, so every round times each variant of a case, the floor
among them, and medians are compared. `clocks` times a single call.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from .clocks import Call, graphed, host_ms, peak_mib, sample
from .records import Timing, failure, record
from .report import case_text, shape_text

BUDGET_S = 0.7  # for the timed rounds of a case, all variants together
QUICK_BUDGET_S = 0.1
ROUNDS = (5, 100)  # at least and at most
TURN_S = 5e-3  # of one variant within a round
SHORT_S = 1e-3  # shorter calls are timed in batches on a CPU, for the first of a turn is slow


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. ``make`` prepares it and returns the call to time.

    ``fields`` are added to its record. ``capture`` is False where a CUDA graph makes it slower.
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
        words = (self.fields["op"], shape_text(self.fields), case_text(self.fields))
        return " ".join(filter(None, words))


def compare(
    case: Case,
    device: torch.device,
    wanted: Collection[str] | None = None,
    budget_s: float = BUDGET_S,
    repeat: Callable[[Call, int], object] | None = None,
) -> list[dict]:
    """Measure a case; returns one record for each variant.

    A variant that fails, for want of memory or otherwise, gives a record without times whose note
    says why.

    Args:
        case: what to measure.
        device: where.
        wanted: names of variants; None is all. The floor is always measured.
        budget_s: seconds that the rounds may take together.
        repeat: called as repeat(one_round, rounds) in place of a loop, for pytest-benchmark.
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


def _prepare(
    variant: Variant, graph: bool, device: torch.device, timing: Timing
) -> tuple[Call, int]:
    """(the warm call, calls per turn); the peak memory and host time go into ``timing``."""
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
