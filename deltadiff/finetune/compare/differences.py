"""Paired differences between what a comparison compares, with their intervals.

Each is a flat record. ``gain`` is by how much the method is better than the other in the metric,
so that above 0 is better whatever the metric; ``low`` and ``high`` are its interval.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from ..methods.table import METHODS
from ..paired_metrics import PAIRED_METRICS
from .cases import SWEEPS, Arm, Case
from .learning_rates import Outcome
from .resampling import LEVEL, Resamples
from .runs import WHERE, Run

JUDGED = ("delta-lora", "diffora")  # the papers' methods, which are compared with all others
# Of the records of a run, what a difference does not have.
_OF_A_RUN = (
    "seed", "metric", "value", "before", "seconds", "step_ms", "peak_mib", "share", "note", "lr",
    "stage", *WHERE,
)  # fmt: skip


def pairs(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """(what is judged, by what), each once.

    A method is compared with its control, with LoRA, and if it is JUDGED with every other one. In a
    sweep it is compared with its control at the same value, and with its own reference value.
    """
    found: dict[tuple[Arm, Arm], None] = {}
    for arm in arms:
        control = METHODS[arm.method].control
        others = [Arm(control, arm.sweep, arm.x)]
        if arm.sweep is not None:
            others.append(Arm(arm.method, arm.sweep, SWEEPS[arm.sweep].reference))
        else:
            others.append(Arm("lora"))
            others += [a for a in arms if arm.method in JUDGED and a.sweep is None]
        found |= dict.fromkeys(
            (arm, other)
            for other in others
            if other in arms and other != arm and (other, arm) not in found
        )
    yield from found


def differences(runs: Mapping[Case, Run], found: Mapping[Case, Outcome], name: str) -> list[dict]:
    """A record for each of `pairs` whose runs all ended, by metric ``name``."""
    metric, seeds = PAIRED_METRICS[name], {case.settings.seed for case in runs}
    by_arm: dict[Arm, list[Case]] = {}
    for case in runs:
        if case in found:
            by_arm.setdefault(case.arm, []).append(case)
    whole = {arm: mine for arm, mine in by_arm.items() if len(mine) == len(seeds)}
    if not whole:
        return []
    ended = {arm: [found[case] for case in mine] for arm, mine in whole.items()}
    examples = len(next(iter(ended.values()))[0].answers)
    resamples = Resamples(len(seeds), examples)
    values = resamples.values(
        metric, {arm: [run.answers for run in mine] for arm, mine in ended.items()}
    )
    sides = {arm: _side([runs[case] for case in whole[arm]], ended[arm]) for arm in whole}
    about = {"op": "compare_difference", "metric": name, "level": LEVEL}
    about |= {"seeds": len(seeds), "examples": examples, "resamples": resamples.count}
    records = []
    for one, other in pairs(list(whole)):
        low, high = resamples.interval(metric.gain(values[one], values[other]))
        gain = metric.gain(sides[one]["mean"], sides[other]["mean"])
        record = about | {"method": one.method, "sweep": one.sweep, "x": one.x}
        record |= {"control": other.method, "control_x": other.x}
        record |= {"gain": gain, "low": low, "high": high} | sides[one]
        record |= {f"control_{field}": value for field, value in sides[other].items()}
        shared = runs[whole[one][0]].records[0]
        records.append(record | {k: v for k, v in shared.items() if k not in {*record, *_OF_A_RUN}})
    return records


def _side(runs: Sequence[Run], ended: Sequence[Outcome]) -> dict:
    """What a record has of each of the two that are compared."""
    trained = [run.records[0]["trainable"] for run in runs if run.result]
    return {
        "mean": statistics.fmean(run.value for run in ended),
        "lr": runs[0].records[0]["lr"],
        "trainable": statistics.fmean(trained) if trained else None,
        "diverged": sum(run.diverged for run in ended),
    }
