"""`deltadiff verify`: check the kernels of a machine and print a table or JSON."""

import argparse
import json
import secrets
from importlib import metadata

from ..devices import find_device
from ..ops.dispatch import BACKENDS
from .run import OPERATIONS
from .run import run as run_checks
from .tolerance import format_table

HOW_TO_READ = """

An error is relative (Frobenius norm), against deltadiff.reference in float64. Accepted is
twice the error of eager PyTorch in the same dtype (three times for gradients) plus one
rounding; "worst" is the largest error of one element over its own limit. Where there is one
right answer every bit is compared, and the error is the share of elements that differ.
Shapes are tokens x in x out, and out x in."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff verify`, and how to read its table."""
    parser.description = (parser.description or "") + HOW_TO_READ
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument(
        "--op", nargs="+", action="extend", choices=tuple(OPERATIONS), metavar="OP",
        help=f"only these of {', '.join(OPERATIONS)}",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="instead of the one that is chosen")
    parser.add_argument("--quick", action="store_true", help="small shapes, no mixed dtypes")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, printed)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Check, print the rows, and return 1 where one of them failed."""
    device = find_device(args.device)
    version = metadata.version("deltadiff")
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if not args.json:
        print(f"deltadiff {version}, verify on {device}, seed {seed}", flush=True)
    rows, ok = run_checks(device, args.op, args.backend, args.quick, seed)
    if args.json:
        report = {"version": version, "device": str(device), "seed": seed, "ok": ok}
        print(json.dumps({**report, "rows": [row.as_dict() for row in rows]}, indent=1))
    else:
        print(format_table(rows))
    return 0 if ok else 1
