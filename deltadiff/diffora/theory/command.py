"""`deltadiff theory`: how often theorem 2's condition holds, and the loss beside the bounds."""

import argparse
import dataclasses
import statistics
import sys

from ...checks import check_int, need_package
from ...errors import ArgumentError
from ...files import as_folder, write_json
from ...text import align_columns
from .experiment import SETTINGS, Counts, Setting, Size, count, run_one
from .plots import plot_courses

SIZE = Size()
HOW_TO_READ = """

For each kind of random draws: in how many draws the condition of theorem 2 holds (the expected
indicators with the selection, minus those without, are positive semi-definite), in how many the
smallest eigenvalue with the selection is at least that without, and in how many the squared error
of a trained network of equation 3 stays below the bound exp(-lambda t). "open" are draws in which
the error of the Monte Carlo estimate leaves the condition's sign unknown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff theory`."""
    parser.description = (parser.description or "") + HOW_TO_READ
    parser.add_argument("--output", default="theory-output", help="folder for theory.json and .png")
    parser.add_argument("--draws", type=int, default=SIZE.draws, help="random draws of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the first draw")


def run(args: argparse.Namespace) -> int:
    """Run the experiment, print its table, and write theory.json and theory.png."""
    check_int("draws", args.draws, 1)
    check_int("seed", args.seed, 0)
    folder = as_folder("output", args.output)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("output", folder, "a folder")
    need_package("matplotlib", "finetune")
    size = dataclasses.replace(SIZE, draws=args.draws)
    counted = []
    for setting in SETTINGS:
        counted.append((setting, count(setting, size, args.seed)))
        if sys.stderr.isatty():
            done = f"{len(counted)} of {len(SETTINGS)} kinds of draws"
            print(done, end="\r", file=sys.stderr, flush=True)
    print(table(counted))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "theory.json", report(counted, size, args.seed))
    courses = [(s, *run_one(s, size, args.seed)[1:]) for s in SETTINGS]
    plot_courses(folder / "theory.png", courses)
    print(f"written: {folder / 'theory.json'}, {folder / 'theory.png'}")
    return 0


def table(counted: list[tuple[Setting, Counts]]) -> str:
    """A line for each kind of draws."""
    header = (
        "frozen weights", "points", "selection", "holds", "open", "lambda larger", "median ratio",
        "loss below bound", "without selection",
    )  # fmt: skip
    rows = [
        (
            s.frozen, s.data, s.selection, f"{c.holds} of {c.draws}", str(c.open),
            f"{c.larger} of {c.draws}", f"{statistics.median(c.ratios):.3f}",
            f"{c.bounded} of {c.draws}", f"{c.plain_bounded} of {c.draws}",
        )
        for s, c in counted
    ]  # fmt: skip
    return align_columns([header, *rows])


def report(counted: list[tuple[Setting, Counts]], size: Size, seed: int) -> dict:
    """What theory.json holds."""
    return {
        "size": dataclasses.asdict(size),
        "seed": seed,
        "settings": [
            dataclasses.asdict(setting)
            | {k: v for k, v in dataclasses.asdict(counts).items() if k != "ratios"}
            | {"median_ratio": statistics.median(counts.ratios)}
            for setting, counts in counted
        ],
    }
