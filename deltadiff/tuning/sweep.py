"""The search for launch configurations that are faster than the defaults on a GPU.

For each configuration that a case asks for there is a short list of candidates. They are compiled
in parallel processes, where one that does not fit the GPU, crashes or hangs does no harm. Those
that then give the default's result take turns with it, as CUDA graphs.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bench.clocks import graphed, sample, synchronize
from ..bench.records import failure
from ..kernels.launch_configs import LAUNCH_CONFIGS
from ..kernels.runtime import tuned
from ..kernels.runtime.tuned import Launch, Rows
from .cases import Call, Case

MARGIN = 0.02  # a candidate that is faster by less could be so by chance
ROUNDS, CALLS = 7, 5
WORKERS = 8  # each holds a CUDA context

Entries = dict[str, int]


# ------------------------------------------------------------------------- compile


def _run_once(case: Case, device: torch.device, table: Rows) -> tuple[Launch, ...]:
    """Compile and run a case; returns the launches for which it asks a configuration."""
    tuned.use(device, {})
    inputs = case.inputs(device)
    tuned.use(device, table)
    launches = tuned.asked(lambda: case.call(inputs)())
    synchronize(device)
    return tuple(launches)


Trial = tuple[tuple, str, frozenset]  # the kind of a case, an operation, entries


def _trial(case: Case, op: str, entries: Entries) -> Trial:
    return case.kind, op, frozenset(entries.items())


def try_out(
    cases: Iterable[Case], device: torch.device, until: float, workers: int = WORKERS
) -> tuple[set[Trial], list[str]]:
    """Run every candidate of every kind of case once, in other processes.

    Args:
        cases: the first of each kind stands for all of them.
        device: where.
        until: a time of `time.monotonic`; what is not ready then does not count as running.
        workers: how many processes at most.

    Returns:
        What compiles and runs, and for each kind whose default does not, a note that says why.
    """
    first = {case.kind: case for case in reversed(list(cases))}.values()
    workers = min(workers, len(os.sched_getaffinity(0)))
    good, notes, trials = set(), [], []
    # Leaving this block ends the processes, even one that hangs.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        defaults = [(case, pool.apply_async(_run_once, (case, device, {}))) for case in first]
        for case, default in defaults:
            try:
                launches = default.get(max(0.0, until - time.monotonic()))
            except Exception as error:
                notes.append(f"{case}: {failure(error)}")
                continue
            for op, launch in {launch.op: launch for launch in launches}.items():
                for entries in LAUNCH_CONFIGS[op].candidates:
                    job = pool.apply_async(_run_once, (case, device, {launch: entries}))
                    trials.append((_trial(case, op, entries), job))
        for trial, job in trials:
            try:
                job.get(max(0.0, until - time.monotonic()))
                good.add(trial)
            except Exception:  # it does not fit, or is not ready in time
                continue
    return good, notes


# ------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Clock:
    """How candidates are timed.

    ``freeze`` makes a call that keeps the present configuration. ``times`` takes such calls and
    gives the seconds of each, one number per round.
    """

    freeze: Callable[[Call], Call]
    times: Callable[[list[Call], torch.device], list[list[float]]]


def _times(calls: list[Call], device: torch.device) -> list[list[float]]:
    for call in calls:
        sample(call, 2, device)
    rounds = [
        [statistics.median(sample(call, CALLS, device)) for call in calls] for _ in range(ROUNDS)
    ]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


GPU_CLOCK = Clock(graphed, _times)


@dataclass(frozen=True)
class Finding:
    """The result of tuning one launch of a case.

    Attributes:
        launch: its key in the table.
        default: its default configuration.
        entries: the entries that are faster than the default's; none where nothing is.
        default_s: seconds of the default.
        speedup: its time over that of ``entries``.
        tried: how many candidates were timed.
    """

    launch: Launch
    default: dict
    entries: Entries
    default_s: float
    speedup: float
    tried: int


def sweep(
    case: Case,
    device: torch.device,
    good: Collection[Trial] | None = None,
    clock: Clock = GPU_CLOCK,
) -> list[Finding]:
    """Tune the launches of a case one after another, each beside the best of those before it.

    Args:
        case: what to run.
        device: where.
        good: the trials that run, as `try_out` found them; None takes all candidates.
        clock: how they are timed.
    """
    tuned.use(device, {})
    inputs, table, findings = case.inputs(device), {}, []
    try:
        usual = case.call(inputs)()
        for launch, default in tuned.asked(lambda: case.call(inputs)()).items():
            calls, tried = [_frozen(case, inputs, device, table, clock)], [{}]
            for entries in LAUNCH_CONFIGS[launch.op].candidates:
                known = good is None or _trial(case, launch.op, entries) in good
                if not known or entries.items() <= default.items():
                    continue
                try:
                    changed = {**table, launch: entries}
                    call = _frozen(case, inputs, device, changed, clock, usual)
                except Exception:  # it fits the case that was tried for its kind, but not this one
                    continue
                if call is not None:
                    calls.append(call)
                    tried.append(entries)
            found = clock.times(calls, device)
            best, speedup = max(range(len(calls)), key=lambda i: _speedup(found, i)), 1.0
            if best:  # the fastest of many may be lucky: once more, alone with the default
                again = clock.times([calls[0], calls[best]], device)
                speedup = min(_speedup(found, best), _speedup(again, 1))
            entries = tried[best] if speedup > 1 + MARGIN else {}
            entries = {k: v for k, v in entries.items() if default[k] != v}
            if entries:
                table[launch] = entries
            seconds = statistics.median(found[0])
            findings.append(Finding(launch, default, entries, seconds, speedup, len(calls) - 1))
    finally:
        tuned.use(device, None)
    return findings


def _frozen(
    case: Case,
    inputs: tuple,
    device: torch.device,
    table: Rows,
    clock: Clock,
    usual: list[Tensor] | None = None,
) -> Call | None:
    """The call under ``table``; None unless it gives the ``usual`` result, the same one twice."""
    tuned.use(device, table)
    if usual is not None:
        found = case.call(inputs)()
        again = case.call(inputs)()
        if not case.agree(found, usual) or not all(map(torch.equal, found, again)):
            return None
    return clock.freeze(case.call(inputs))


def _speedup(found: list[list[float]], i: int) -> float:
    """Speedup of call i over call 0: the median of ratios within rounds, which ignores drift."""
    return statistics.median(a / b for a, b in zip(found[0], found[i], strict=True))
