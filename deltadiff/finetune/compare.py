"""`deltadiff compare`: the same model, text, seeds and budget for each method.

Each run is a `deltadiff finetune` with one seed; what it measured becomes flat records, one a
metric. Mean and standard deviation over the seeds, the cost of each method and figures are made
from the records. A run whose records are there is not run again, so an interrupted comparison goes
on when the same command is given again.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import shutil
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

from ..devices import environment, free_memory
from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import slug, write_json
from . import compare_report as report
from .command import device_of, finetune, load_task
from .methods import METHODS
from .packages import check_packages
from .settings import Settings, given_settings, make_settings, parse_value
from .settings import add_arguments as add_settings

NEVER = 10**9  # steps between checkpoints: a run is short, and is begun anew


WHERE = ("output", "device", "save_every")  # settings that say where or how, not what


# ------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Sweep:
    """A table of a paper: ``field`` takes ``values`` under each of ``methods``."""

    table: str
    field: str
    methods: tuple[str, ...]
    values: Callable[[Settings], Sequence[float]]


def _start_steps(settings: Settings) -> list[int]:
    """The paper's 0 to 1000; in a run that is too short for them, tenths of it."""
    step = 100 if settings.steps > 1000 else max(1, settings.steps // 10)
    return [i * step for i in range(11) if i * step < settings.steps]


SWEEPS = {
    "lambda": Sweep(
        "Delta-LoRA, table 8", "update_ratio", ("delta-lora", "lora-alpha-control"),
        lambda settings: (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    ),
    "k": Sweep("Delta-LoRA, table 9", "start_step", ("delta-lora",), _start_steps),
    "ratio": Sweep(
        "DiffoRA, table 4", "ratio", ("diffora", "diffora-random"),
        lambda settings: (0.2, 0.4, 0.5, 0.7, 0.9),
    ),
    "sharing": Sweep(
        "DiffoRA, table 5 (0: no sharing)", "share_r", ("diffora",),
        lambda settings: (0, settings.share_r),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run; ``sweep`` and ``x`` are None outside a sweep."""

    settings: Settings
    sweep: str | None = None
    x: float | None = None

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    def __str__(self) -> str:
        value = "" if self.sweep is None else f" {self.sweep} {self.x:g}"
        return f"{self.settings.method}{value} seed {self.settings.seed}"


def cases(
    given: Mapping[str, object],
    output: Path,
    methods: Sequence[str],
    seeds: int,
    sweeps: Sequence[str] = (),
    values: Sequence[float] | None = None,
    own: Sequence[tuple[str, str, object]] = (),
) -> list[Case]:
    """All runs of a comparison; a seed of all methods first, then the next seed.

    ``own``: (pattern of methods, field, value) for some methods alone. What a method's name stands
    for comes before what is given.
    """

    def make(method: str, seed: int, named: str = "", **swept) -> Settings:
        place = output / "runs" / f"{method}{named}-seed{seed}"
        mine = {k: v for k, v in given.items() if k not in METHODS[method].fixes}
        mine |= {name: value for pattern, name, value in own if fnmatch(method, pattern)}
        mine |= swept | {"method": method, "seed": seed, "output": str(place)}
        return make_settings({"save_every": NEVER} | mine)

    first = given.get("seed", Settings.seed)
    found = []
    for seed in range(first, first + seeds):
        found += [Case(make(method, seed)) for method in methods]
        for name in sweeps:
            sweep = SWEEPS[name]
            kind = type(getattr(Settings, sweep.field))
            for method in sweep.methods:
                for x in values or sweep.values(make(method, seed)):
                    settings = make(method, seed, f"-{name}-{x:g}", **{sweep.field: kind(x)})
                    found.append(Case(settings, name, float(x)))
    return found


# ------------------------------------------------------------------------------- runs


def run_case(case: Case, task: str, alone: bool) -> list[dict]:
    """The records of a case: those of an earlier run of it, or of a new one.

    ``alone``: no other run goes on beside it, so that its time means something.

    Raises:
        ArgumentError: the folder holds a run with other settings.
        Interrupted, KeyboardInterrupt: the same call goes on with it.
    """
    folder, settings = case.folder, case.settings
    _check_same(settings, folder)
    earlier = _read(folder / "records.json")
    if earlier is not None:
        return earlier
    resume = (folder / "settings.json").exists() and not (folder / "result.json").exists()
    if folder.exists() and not resume:
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    device = device_of(settings)
    result, note, final = None, None, True
    with folder.with_suffix(".log").open("a") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                result = finetune(settings, resume=resume, export=False)
            except Interrupted:
                raise
            except (NonFiniteLossError, torch.OutOfMemoryError) as error:
                note = f"failed: {str(error).splitlines()[0]}"
                # What other runs take of the memory may be free next time.
                final = alone or isinstance(error, NonFiniteLossError)
            except Exception as error:  # one method must not end the others; the log has it all
                cannot = isinstance(error, ArgumentError) and error.argument == "method"
                reason = error.given if cannot else f"{type(error).__name__}: {error}"
                note = textwrap.shorten(f"{'cannot run' if cannot else 'failed'}: {reason}", 400)
                final = False  # what it lacks may be there next time
                traceback.print_exc()
    free_memory(device)
    found = records(case, task, result, note, environment(device), alone)
    if final:
        folder.mkdir(exist_ok=True)
        write_json(folder / "records.json", found)
    return found


def records(
    case: Case, task: str, result: dict | None, note: str | None, where: dict, alone: bool
) -> list[dict]:
    """A flat record a metric; one without a metric where there is only a ``note``."""
    settings = result["settings"] if result else dataclasses.asdict(case.settings)
    head = {"op": "compare", "method": case.settings.method, "task": task}
    head |= {"seed": case.settings.seed, "sweep": case.sweep, "x": case.x}
    result, search = result or {}, (result or {}).get("search", {})
    known_peak = where["driver"] is not None  # resident memory of a process tells no run apart
    seconds = [result.get("seconds"), search.get("seconds", 0)]
    peaks = [s.get("peak_memory_mib") or 0 for s in (result, search)]
    cost = {
        "trainable": result.get("trainable_parameters"),
        "seconds": round(sum(seconds), 3) if alone and None not in seconds else None,
        "step_ms": round(result["seconds_per_step"] * 1e3, 3) if result and alone else None,
        "peak_mib": round(max(peaks), 1) if result and known_peak else None,
        "share": (result.get("weight_update") or {}).get("share"),
        "note": note,
    }
    tail = {name: Path(settings[name]).name for name in ("model", "data", "heldout")}
    tail |= {k: v for k, v in settings.items() if k not in (*WHERE, *head, *tail)}
    before, after = result.get("before", {}), result.get("after", {None: None})
    return [
        head | {"metric": name, "value": value, "before": before.get(name)} | cost | tail | where
        for name, value in after.items()
    ]


def _check_same(settings: Settings, folder: Path) -> None:
    """That what the folder holds was made with these settings."""
    held, wanted = _read(folder / "settings.json") or {}, dataclasses.asdict(settings)
    skipped = (*WHERE, "steps") if settings.epochs else WHERE  # steps follow from epochs
    for name, value in held.items():
        if name not in skipped and wanted.get(name) != value:
            given = f"{folder.parent.parent}, where {name} was {value} and not {wanted.get(name)}"
            raise ArgumentError("output", given, "the settings of that comparison, or a new folder")


def _read(path: Path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def run_all(todo: Sequence[Case], task: str, jobs: int) -> Iterator[tuple[Case, list[dict]]]:
    """Each case with its records, as they are done; ``jobs`` processes at a time."""
    if jobs == 1:
        for case in todo:
            yield case, run_case(case, task, alone=True)
        return
    context = multiprocessing.get_context("spawn")  # CUDA takes no fork
    pool = ProcessPoolExecutor(jobs, mp_context=context)
    try:
        futures = {pool.submit(run_case, case, task, False): case for case in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff compare`, and those of `deltadiff finetune` for every run."""
    names = ", ".join(METHODS)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME",
        help=f"of {names} (default: all of them; with --sweep none)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of each (default 3)"
    )
    parser.add_argument(
        "--sweep", nargs="+", choices=tuple(SWEEPS), default=[],
        help="; ".join(f"{name}: {sweep.table}" for name, sweep in SWEEPS.items()),
    )  # fmt: skip
    parser.add_argument("--values", nargs="+", type=float, metavar="X", help="of the sweep")
    parser.add_argument(
        "--set", nargs="+", metavar="METHOD.OPTION=VALUE", default=[],
        help="an option of some methods alone, such as 'full*.lr=5e-5'",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time; with more than one, times are left out (default 1)",
    )  # fmt: skip
    parser.add_argument("--task", help="its name in the records (default: of the data)")
    parser.add_argument(
        "--output", default="compare-output", help="folder; goes on with what it has"
    )
    add_settings(parser, leave_out=("output", "method"))


def run(args: argparse.Namespace) -> int:
    """The command: 0; 1 if a run failed; 2 for input that cannot be used; 130 when stopped."""
    check_packages()
    output, given = Path(args.output), given_settings(args)
    given.pop("output", None)
    todo = _cases(args, output, given)
    _check_input(todo[0].settings)
    name = args.task or Path(given["data"]).name.partition(".")[0].replace("package:", "")
    found: dict[Case, list[dict]] = {}
    try:
        for case, mine in run_all(todo, name, args.jobs):
            found[case] = mine
            print(f"{len(found)}/{len(todo)} {case}: {report.line(mine)}", flush=True)
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on with it")
        return 130
    ordered = [record for case in todo for record in found[case]]
    results = [(case, _read(case.folder / "result.json")) for case in todo]
    place = output / f"compare-{slug(name)}-{slug(ordered[0]['gpu'])}"
    paths = report.write(place, ordered, results)
    print("\n" + report.text(ordered))
    print("\n".join(f"written: {path}" for path in paths))
    return int(any(r["note"] and r["note"].startswith("failed") for r in ordered))


def _cases(args: argparse.Namespace, output: Path, given: dict) -> list[Case]:
    for name in ("model", "data"):
        if name not in given:
            raise ArgumentError(name, "nothing", "deltadiff compare MODEL DATA")
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ArgumentError(name, getattr(args, name), "an int of at least 1")
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
    if output.exists() and (not output.is_dir() or not _is_comparison(output)):
        raise ArgumentError("output", f"{output}, which holds something else", "a new folder")
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
    return (output / "runs").is_dir() or not any(output.iterdir())


def _check_input(settings: Settings) -> None:
    """Text or a model that cannot be used would make a note of every run."""
    with contextlib.redirect_stdout(None):
        load_task(settings)
    free_memory(device_of(settings))
