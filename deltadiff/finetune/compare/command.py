"""The command `deltadiff compare`."""

import argparse
import contextlib
import math
import re
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from ...devices import free_memory
from ...errors import ArgumentError, Interrupted
from ...files import as_folder, remove_leftovers, slug
from ...loop import end_on_sigterm, exit_code
from ..folder_lock import LOCK_FILE, locked
from ..inputs import device_of, load_inputs
from ..methods.table import METHODS
from ..options import add_settings, given_settings, parse_value, require_model_and_data
from ..packages import check_packages
from ..paired_metrics import CHOICE_METRICS, COMPLETION_METRICS
from ..run_inputs import INPUTS_FILE, note_or_check_files
from ..settings import Settings
from ..tasks.base import Task
from . import report
from .cases import SWEEPS, Case, cases
from .differences import differences
from .learning_rates import (
    FACTORS,
    best_rates,
    check_heldout,
    final_cases,
    mark,
    outcomes,
    tuning_cases,
)
from .runs import DIVERGED, Run, Runner, TimeIsUp, read_run

TUNE_SHARE = 0.2
TIME_IS_UP = 3  # exit code
MOST_RUNS = 10_000  # more would not end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff compare`, and those of `deltadiff finetune` for every run."""
    names = ", ".join(METHODS)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME",
        help=f"some of {names} (default: all of them; with --sweep none)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each method (default 3)"
    )
    parser.add_argument(
        "--sweep", nargs="+", choices=tuple(SWEEPS), default=[],
        help="; ".join(f"{name}: {sweep.table}" for name, sweep in SWEEPS.items()),
    )  # fmt: skip
    parser.add_argument("--values", nargs="+", type=float, metavar="X", help="values of the sweep")
    parser.add_argument(
        "--set", nargs="+", metavar="METHOD.OPTION=VALUE", default=[],
        help="an option of some methods alone, such as 'full*.lr=5e-5'",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time; with more than one, times are left out (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--tune-lr", nargs="*", type=float, metavar="LR",
        help="run each method at its own best learning rate of these (default: "
        f"{', '.join(f'{x:g}' for x in FACTORS)} times the given one), chosen with the first seed "
        "on a part of the training text",
    )  # fmt: skip
    parser.add_argument(
        "--tune-share", type=float, metavar="X",
        help=f"that part of the training text (default {TUNE_SHARE:g})",
    )  # fmt: skip
    parser.add_argument(
        "--metric", metavar="NAME",
        help="with --tune-lr: what rates are chosen and methods compared by, one of "
        f"{', '.join(CHOICE_METRICS)} (default: the first that the task has)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, metavar="MINUTES",
        help="begin no run after so many minutes; the same command goes on (exit code 3)",
    )  # fmt: skip
    parser.add_argument("--task", help="what the records call the data (default: its name)")
    parser.add_argument(
        "--output", default="compare-output", help="folder; a comparison in it goes on"
    )
    add_settings(parser, leave_out=("output", "method"))


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code, see `deltadiff --help`."""
    started = time.monotonic()
    check_packages()
    output, given = as_folder("output", args.output), given_settings(args)
    given.pop("output", None)
    todo = _cases(args, output, given)
    until = None if args.time_limit is None else started + 60 * args.time_limit
    with end_on_sigterm() as received:
        try:
            with locked(output):
                return _run(args, output, todo, until)
        except (Interrupted, KeyboardInterrupt) as stop:
            print("stopped; the same command goes on with it")
            return exit_code([stop.number] if isinstance(stop, Interrupted) else received)
        except TimeIsUp:
            print("the time is up; the same command goes on with it")
            return TIME_IS_UP


def _run(args: argparse.Namespace, output: Path, todo: list[Case], until: float | None) -> int:
    runs = output / "runs"
    remove_leftovers(output, r"compare-[a-z0-9-]+\.\w+")
    remove_leftovers(runs, re.escape(INPUTS_FILE))
    if not _is_comparison(output):
        raise ArgumentError("output", f"{output}, which holds something else", "a new folder")
    settings = todo[0].settings
    task = _check_input(settings)
    metric = None if args.tune_lr is None else _metric(args.metric, task)
    runs.mkdir(exist_ok=True)
    note_or_check_files(runs, settings)
    name = args.task or Path(settings.data).name.partition(".")[0].replace("package:", "")

    tuned: dict[Case, Run] = {}
    with Runner(name, args.jobs, until) as runner:
        if metric is not None:
            tuned = _run_all(
                runner, tuning_cases(todo, args.tune_lr, args.tune_share or TUNE_SHARE)
            )
            todo = final_cases(todo, best_rates(outcomes(tuned, metric), metric))
        ran = _run_all(runner, todo)
    more: list[dict] = []
    if metric is not None:
        mark(tuned, outcomes(tuned, metric), metric)
        ended = outcomes(ran, metric)
        mark(ran, ended, metric)
        more = [record for run in tuned.values() for record in run.records]
        more += differences(ran, ended, metric)
        for name_of_text in COMPLETION_METRICS:  # of runs that generated none, there are none
            more += differences(ran, outcomes(ran, name_of_text), name_of_text)
    ordered = [record for run in ran.values() for record in run.records]
    place = output / f"compare-{slug(name)}-{slug(ordered[0]['gpu'])}"
    paths = report.write(place, ordered + more, [(case, run.result) for case, run in ran.items()])
    print("\n" + report.text(ordered + more))
    print("\n".join(f"written: {path}" for path in paths))
    runs = [*tuned.values(), *ran.values()]
    return int(any(_counts_as_failed(record) for run in runs for record in run.records))


def _run_all(runner: Runner, todo: list[Case]) -> dict[Case, Run]:
    """All runs, in the order of ``todo``; each is told when it is done."""
    found: dict[Case, list[dict]] = {}
    for case, mine in runner.run(todo):
        found[case] = mine
        print(f"{len(found)}/{len(todo)} {case}: {report.line(mine)}", flush=True)
    return {case: read_run(case, found[case]) for case in todo}


def _counts_as_failed(record: dict) -> bool:
    """Whether a run ended as it should not. One at a tuned rate may diverge: it is marked."""
    words = "failed" if record.get("stage") else ("failed", DIVERGED)
    return bool(record["note"]) and record["note"].startswith(words)


def _cases(args: argparse.Namespace, output: Path, given: Mapping[str, object]) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
        ArgumentError: it asks for something that cannot be run.
    """
    require_model_and_data(given, "deltadiff compare MODEL DATA")
    _check_tuning(args)
    for name in ("seeds", "jobs"):
        if not 1 <= getattr(args, name) <= MOST_RUNS:
            raise ArgumentError(name, getattr(args, name), f"an int from 1 to {MOST_RUNS}")
    methods = [m for words in args.methods or () for m in words.split(",") if m]
    for method in methods:
        if method not in METHODS:
            raise ArgumentError("methods", repr(method), ", ".join(METHODS))
    if args.values and len(args.sweep) != 1:
        raise ArgumentError("values", args.values, "values of one --sweep")
    if not methods and not args.sweep:
        methods = list(METHODS)
    own = [_own_option(word) for word in args.set]
    if args.tune_lr and any(name == "lr" for _, name, _ in own):
        raise ArgumentError("set", "lr beside rates of --tune-lr", "--tune-lr without rates")
    found = cases(given, output, methods, args.seeds, args.sweep, args.values, own)
    for case in found:
        case.settings.check()
    if args.tune_lr is not None:
        check_heldout(found[0].settings)
        for case in tuning_cases(found, args.tune_lr, args.tune_share or TUNE_SHARE):
            case.settings.check()
    return found


def _check_tuning(args: argparse.Namespace) -> None:
    """Check the options about tuning and time.

    Raises:
        ArgumentError: one of them is out of its range, or means nothing without --tune-lr.
    """
    if args.tune_lr is None:
        for name in ("metric", "tune_share"):
            if getattr(args, name) is not None:
                raise ArgumentError(name, getattr(args, name), "none without --tune-lr")
    elif len(set(args.tune_lr)) < len(args.tune_lr) or len(args.tune_lr) == 1:
        raise ArgumentError("tune_lr", args.tune_lr, "two different learning rates or more")
    if args.metric is not None and args.metric not in CHOICE_METRICS:
        raise ArgumentError("metric", repr(args.metric), " or ".join(CHOICE_METRICS))
    if args.tune_share is not None and not 0 < args.tune_share < 1:
        raise ArgumentError("tune_share", args.tune_share, "a share above 0 and below 1")
    if args.time_limit is not None and not 0 < args.time_limit < math.inf:
        raise ArgumentError("time_limit", args.time_limit, "a number of minutes above 0")


def _metric(name: str | None, task: Task) -> str:
    """The metric to compare by, which the user may have named.

    Raises:
        ArgumentError: the task has no such metric.
    """
    known = task.paired_metrics
    if not known:
        given = f"text of the kind {task.name!r}, whose answers are not compared one by one"
        raise ArgumentError("tune_lr", given, "text with labels or numbers, or text alone")
    if name is not None and name not in known:
        raise ArgumentError("metric", repr(name), f"{' or '.join(known)}, for this text")
    return name or next(iter(known))


def _own_option(word: str) -> tuple[str, str, object]:
    """(pattern of methods, field, value) of METHOD.OPTION=VALUE."""
    place, equals, value = word.partition("=")
    pattern, dot, option = place.rpartition(".")
    if not (equals and dot):
        raise ArgumentError("set", repr(word), "METHOD.OPTION=VALUE, such as 'full*.lr=5e-5'")
    if not any(fnmatch(method, pattern) for method in METHODS):
        raise ArgumentError("set", repr(word), f"one of {', '.join(METHODS)}, or a pattern of them")
    name = option.replace("-", "_")
    return pattern, name, parse_value(name, value)


def _is_comparison(output: Path) -> bool:
    return (output / "runs").is_dir() or {path.name for path in output.iterdir()} <= {LOCK_FILE}


def _check_input(settings: Settings) -> Task:
    """Load text and model once: an error in them would otherwise become a note of every run."""
    with contextlib.redirect_stdout(None):
        inputs = load_inputs(settings)
    if inputs.skipped:
        print(f"skipped: {inputs.skipped}")
    task = inputs.model.task
    del inputs
    free_memory(device_of(settings))
    return task
