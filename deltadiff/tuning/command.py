"""`deltadiff tune`: its options, and the run from measuring to the table."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bench.arguments import count, shape
from ..bench.layer import GRAPHED, SHAPES
from ..bench.records import failure
from ..checks import HALF_DTYPES, NAMED_DTYPES, dtype_name
from ..devices import find_device, free_memory
from ..errors import ArgumentError
from ..ops.backends import why_unavailable

if TYPE_CHECKING:  # these need Triton; without it there is nothing to tune, and `run` says so
    from .cases import Case
    from .sweep import Finding

RANKS = (8, 16)
TOKENS = 8192  # in a step, for the layers of a model
BUDGET_S = 120.0
COMPILE_SHARE = 0.6  # of the budget, at most

DESCRIPTION = """\
Try other launch configurations than the defaults, keep those that give the same result at least
2 % faster, and write them to a table for this GPU. Later runs use it; without it nothing is tuned
at run time. The results of the kernels change by rounding at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deltadiff tune`."""
    parser.description = DESCRIPTION
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 (default cuda)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--shapes", nargs="+", type=shape, metavar="MxKxN",
        help="layers, tokens x in x out (default: those that `deltadiff bench layer` shows)",
    )  # fmt: skip
    sizes.add_argument(
        "--config", type=Path, metavar="FILE", help="the layers of a Hugging Face config.json"
    )
    parser.add_argument(
        "--tokens", type=count, default=TOKENS, metavar="M",
        help=f"in a step, for --config (default {TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", nargs="+", type=count, default=RANKS, metavar="R",
        help=f"default {' '.join(map(str, RANKS))}",
    )  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=[dtype_name(dtype) for dtype in HALF_DTYPES],
        default="bfloat16",
        help="default bfloat16",
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, metavar="SECONDS",
        help=f"for all of it (default {BUDGET_S:.0f}); what is left then keeps the defaults",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there instead")
    parser.add_argument("--remove", action="store_true", help="delete the table, measure nothing")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ArgumentError: there is nothing to tune, or a table cannot be read or written.
    """
    device = find_gpu(args.device)
    from ..kernels.runtime import tuned
    from . import table

    gpu = torch.cuda.get_device_name(device)
    path = args.output or tuned.user_path(gpu)
    if args.remove:
        print(f"removed: {path}" if path.exists() else f"there is no {path}")
        path.unlink(missing_ok=True)
        return 0
    rows, shipped = table.read(path), table.read(tuned.shipped_path(gpu))
    print(f"{gpu}, {len(rows)} rows in {path}", flush=True)
    rows = table.keep(measure(args, device), path, gpu, rows, shipped)
    tuned.use(device, None)
    print(f"{len(rows)} rows in {path}")
    return 0


def find_gpu(name: str) -> torch.device:
    """The GPU of that name; raises ArgumentError where the Triton kernels do not run."""
    accepted = "an NVIDIA GPU with Triton; for others there is nothing to tune"
    if not torch.cuda.is_available():
        raise ArgumentError("device", f"{name!r}, and no NVIDIA GPU was found", accepted)
    device = find_device(name)
    reason = why_unavailable("triton", device, torch.bfloat16)
    if device.type != "cuda" or reason:
        raise ArgumentError("device", f"{name!r} ({reason or 'no GPU'})", accepted)
    return device


def measure(args: argparse.Namespace, device: torch.device) -> "Iterator[Finding]":
    """Yield and print what is found, until the budget is spent."""
    from .sweep import sweep, try_out

    start = time.monotonic()
    cases = chosen_cases(args)
    print(f"{len(cases)} cases; compiling their candidates", file=sys.stderr, flush=True)
    good, notes = try_out(cases, device, start + COMPILE_SHARE * args.budget)
    for note in notes:
        print(f"left out: {note}", file=sys.stderr, flush=True)
    kinds = {kind for kind, *_ in good}
    for case in cases:
        if case.kind not in kinds:
            print(f"left out, as no candidate ran in time: {case}")
            continue
        if time.monotonic() > start + args.budget:
            print(f"left out, for time: {case} (see --budget)")
            continue
        try:
            findings = sweep(case, device, good)
        except Exception as error:  # one that has too little memory must not cost the others
            print(f"left out: {case}: {failure(error)}", file=sys.stderr, flush=True)
            continue
        for finding in findings:
            print(f"{case}: {describe(finding)}", flush=True)
            yield finding
        free_memory(device)


def chosen_cases(args: argparse.Namespace) -> "list[Case]":
    """The cases that the options ask for: the layers of a model or of shapes, with each rank."""
    from .cases import cases_of, layer_sizes

    shapes = args.shapes or (*SHAPES, *GRAPHED)
    if args.config is not None:
        shapes = [(args.tokens, *sizes) for sizes in layer_sizes(args.config)]
    return cases_of(shapes, args.ranks, NAMED_DTYPES[args.dtype])


def describe(finding: "Finding") -> str:
    """A finding in words."""
    text = f"{finding.launch.op} {finding.default_s * 1e3:.3f} ms"
    if not finding.entries:
        return f"{text}, none of {finding.tried} is faster"
    changes = (f"{k} {finding.default[k]} -> {v}" for k, v in finding.entries.items())
    return f"{text}, {finding.speedup - 1:.1%} faster: {', '.join(changes)}"
