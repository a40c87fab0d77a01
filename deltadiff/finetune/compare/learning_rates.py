"""`--tune-lr`: each method at its own best learning rate, before the runs that are reported.

The rate is chosen with the first seed on a part of the training text, which the runs of the choice
do not train on. The held-out text is not read for it.

A run counts as **diverged** if its loss was not finite, or if it ends no better than what needs no
training: the better of the model before training and of the best constant answer (the most
frequent class, the mean number). It stays in every mean, where it was not finite with the constant
answer, and in the tables it is marked.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from ...errors import ArgumentError
from ..paired_metrics import PAIRED_METRICS, PairedMetric
from ..settings import Settings
from .cases import Arm, Case
from .runs import Run

FACTORS = (0.3, 1.0, 3.0, 10.0)  # of the given rate, if no rates are given


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its answers, the metric that runs are compared by, whether it diverged."""

    answers: ndarray
    value: float
    diverged: bool


def tuning_cases(todo: Sequence[Case], rates: Sequence[float], share: float) -> list[Case]:
    """The runs by which the learning rates are chosen: those of the first seed, at each rate.

    ``share`` of the training text takes the place of the held-out text. Nothing is generated.
    """
    first, found = todo[0].settings.seed, []
    for case in todo:
        given = case.settings
        if given.seed != first:
            continue
        for lr in rates or [float(f"{factor * given.lr:.6g}") for factor in FACTORS]:
            settings = dataclasses.replace(
                given, lr=lr, heldout=f"{share:g}", generate=0, evaluate_every=0,
                output=f"{given.output}-tuning-lr{lr:g}",
            )  # fmt: skip
            found.append(dataclasses.replace(case, settings=settings, stage="tuning"))
    return found


def check_heldout(settings: Settings) -> None:
    """Check that there is held-out text apart from the training text, the same for all seeds.

    Raises:
        ArgumentError: a share of the training text is held out, or the training text itself.
    """
    accepted = "a file with held-out text of its own, for --tune-lr"
    try:
        float(settings.heldout)
    except ValueError:
        if Path(settings.heldout).resolve() == Path(settings.data).resolve():
            given = f"{settings.heldout}, which is the training text"
            raise ArgumentError("heldout", given, accepted) from None
        return
    given = f"{settings.heldout}, a share of the text, which each seed splits anew"
    raise ArgumentError("heldout", given, accepted)


def outcomes(runs: Mapping[Case, Run], name: str) -> dict[Case, Outcome]:
    """How each run ended, by metric ``name``; those that could not run at all are left out.

    All have the same text to answer.
    """
    metric = PAIRED_METRICS[name]
    answered = {
        case: np.array(run.result[metric.kept_in], dtype=float)
        for case, run in runs.items()
        if run.result and run.result.get(metric.kept_in)  # older runs have none
    }
    starts = {
        case: run.result["before"].get(name) for case, run in runs.items() if case in answered
    }
    known = [value for value in starts.values() if value is not None]
    found = {}
    for case, run in runs.items():
        if not answered or not (case in answered or run.not_finite):
            continue
        before = starts.get(case, statistics.fmean(known) if known else None)
        mine = answered.get(case)
        constant = metric.constant(next(iter(answered.values())), before)
        floor = metric.of(constant)
        if before is not None and metric.gain(before, floor) > 0:
            floor = before
        if mine is None:
            found[case] = Outcome(constant, metric.of(constant), True)
        else:
            value = metric.of(mine)
            found[case] = Outcome(mine, value, metric.gain(value, floor) <= 0)
    return found


def mark(runs: Mapping[Case, Run], found: Mapping[Case, Outcome], name: str) -> None:
    """Say in the records of runs which metric they are compared by, and which of them diverged.

    A run that has no such metric, as its loss was not finite or its answers were all the same, gets
    a record with the value that it counts with.
    """
    for case, run in runs.items():
        ended = found.get(case)
        if ended is not None and all(r["metric"] != name for r in run.records):
            known = [r for r in run.records if r["metric"] is not None]
            counted = run.records[0] | {"metric": name, "value": ended.value, "before": None}
            run.records[:] = [*known, counted]
        for record in run.records:
            record |= {"by": name, "diverged": None if ended is None else ended.diverged}


def best_rates(found: Mapping[Case, Outcome], name: str) -> dict[Arm, float]:
    """The learning rate of each arm's best run; of equally good ones the smaller.

    A run that diverged is chosen only where all of its arm did.
    """
    metric, best = PAIRED_METRICS[name], {}
    for case in sorted(found, key=lambda case: case.settings.lr):
        mine, rival = found[case], best.get(case.arm)
        if rival is None or _is_better(mine, found[rival], metric):
            best[case.arm] = case
    return {arm: case.settings.lr for arm, case in best.items()}


def _is_better(one: Outcome, other: Outcome, metric: PairedMetric) -> bool:
    if one.diverged != other.diverged:
        return other.diverged
    return metric.gain(one.value, other.value) > 0


def final_cases(todo: Sequence[Case], rates: Mapping[Arm, float]) -> list[Case]:
    """The runs that are reported, at the chosen rates; an arm that never ran keeps its own."""
    found = []
    for case in todo:
        lr = rates.get(case.arm, case.settings.lr)
        settings = dataclasses.replace(
            case.settings, lr=lr, output=f"{case.settings.output}-lr{lr:g}"
        )
        found.append(dataclasses.replace(case, settings=settings, stage="final"))
    return found
