"""The command `deltadiff compare`."""

import argparse
import contextlib
import re
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
from ..run import RESULT_FILE
from ..run_inputs import INPUTS_FILE, note_or_check_files
from ..settings import Settings
from . import report
from .cases import SWEEPS, Case, cases
from .runs import read_if_there, run_all

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
    parser.add_argument("--task", help="what the records call the data (default: its name)")
    parser.add_argument(
        "--output", default="compare-output", help="folder; a comparison in it goes on"
    )
    add_settings(parser, leave_out=("output", "method"))


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code, see `deltadiff --help`."""
    check_packages()
    output, given = as_folder("output", args.output), given_settings(args)
    given.pop("output", None)
    todo = _cases(args, output, given)
    with end_on_sigterm() as received:
        try:
            with locked(output):
                return _run(args, output, todo)
        except (Interrupted, KeyboardInterrupt) as stop:
            print("stopped; the same command goes on with it")
            return exit_code([stop.number] if isinstance(stop, Interrupted) else received)


def _run(args: argparse.Namespace, output: Path, todo: list[Case]) -> int:
    runs = output / "runs"
    remove_leftovers(output, r"compare-[a-z0-9-]+\.\w+")
    remove_leftovers(runs, re.escape(INPUTS_FILE))
    if not _is_comparison(output):
        raise ArgumentError("output", f"{output}, which holds something else", "a new folder")
    settings = todo[0].settings
    _check_input(settings)
    runs.mkdir(exist_ok=True)
    note_or_check_files(runs, settings)
    name = args.task or Path(settings.data).name.partition(".")[0].replace("package:", "")
    found: dict[Case, list[dict]] = {}
    for case, mine in run_all(todo, name, args.jobs):
        found[case] = mine
        print(f"{len(found)}/{len(todo)} {case}: {report.line(mine)}", flush=True)
    ordered = [record for case in todo for record in found[case]]
    results = [(case, read_if_there(case.folder / RESULT_FILE)) for case in todo]
    place = output / f"compare-{slug(name)}-{slug(ordered[0]['gpu'])}"
    paths = report.write(place, ordered, results)
    print("\n" + report.text(ordered))
    print("\n".join(f"written: {path}" for path in paths))
    return int(any(r["note"] and r["note"].startswith("failed") for r in ordered))


def _cases(args: argparse.Namespace, output: Path, given: Mapping[str, object]) -> list[Case]:
    """The cases that the command line asks for.

    Raises:
        ArgumentError: it asks for something that cannot be run.
    """
    require_model_and_data(given, "deltadiff compare MODEL DATA")
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
    found = cases(given, output, methods, args.seeds, args.sweep, args.values, own)
    for case in found:
        case.settings.check()
    return found


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


def _check_input(settings: Settings) -> None:
    """Load text and model once: an error in them would otherwise become a note of every run."""
    with contextlib.redirect_stdout(None):
        skipped = load_inputs(settings).skipped
    if skipped:
        print(f"skipped: {skipped}")
    free_memory(device_of(settings))
