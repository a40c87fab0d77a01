"""`deltadiff verify`: check the kernels of a machine and print a table or JSON."""

import argparse
import json
import secrets
from importlib import metadata

from ..devices import find_device
from ..errors import ArgumentError
from ..ops.backends import BACKENDS
from .grid.run import GRID, run_grid, run_number
from .grid.table import format_cells
from .run import OPERATIONS
from .run import run as run_checks
from .tolerance import format_table

HOW_TO_READ = """

An error is relative (Frobenius norm), against deltadiff.reference in float64. Accepted is
twice the error of eager PyTorch in the same dtype (three times for gradients) plus one
rounding; "worst" is the largest error of one element over its own limit. Where there is one
right answer every bit is compared, and the error is the share of elements that differ.
Shapes are tokens x in x out, and out x in.

With --full, hundreds of random calls of each operation run on every path that is here, with
guarded memory, any layout, and values that are not finite. A row tells how many cases there were,
and the largest error over its limit; a failure comes with the command that repeats it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff verify`, and how to read its table."""
    parser.description = (parser.description or "") + HOW_TO_READ
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument(
        "--op", nargs="+", action="extend", choices=tuple(OPERATIONS | GRID), metavar="OP",
        help=f"only these of {', '.join(OPERATIONS)}; with --full also of "
        f"{', '.join(GRID.keys() - OPERATIONS.keys())}",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="instead of the one that is chosen")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="small shapes, no mixed dtypes")
    form.add_argument("--full", action="store_true", help="random calls on every path, for minutes")
    parser.add_argument("--case", type=int, help="with --full, --op and --seed: only this case")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, printed)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check, print the rows, and return 1 where one of them failed."""
    device = find_device(args.device)
    version = metadata.version("deltadiff")
    if args.case is not None and not (args.full and args.seed is not None and args.op):
        raise ArgumentError("--case", args.case, "a number beside --full, --seed and one --op")
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if not args.json:
        print(f"deltadiff {version}, verify on {device}, seed {seed}", flush=True)
    if args.full and args.case is None:
        rows = run_grid(device, seed, args.op, args.backend)
        ok = any(row.cases for row in rows) and not any(row.failures for row in rows)
        table = format_cells(rows, device, seed)
    else:
        if args.case is None:
            rows, ok = run_checks(device, args.op, args.backend, args.quick, seed)
        else:
            rows = run_number(device, seed, args.op[0], args.case)
            ok = all(row.ok for row in rows)
        table = format_table(rows)
    if args.json:
        report = {"version": version, "device": str(device), "seed": seed, "ok": ok}
        print(json.dumps({**report, "rows": [row.as_dict() for row in rows]}, indent=1))
    else:
        print(table)
    return 0 if ok else 1
