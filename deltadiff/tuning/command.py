"""`deltadiff tune`: find the launch configurations that are fastest on this GPU and keep them."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..bench.layer import GRAPHED, SHAPES
from ..bench.timing import failure
from ..checks import HALF_DTYPES, NAMED_DTYPES, ROUNDINGS, dtype_name
from ..devices import find_device, free_memory
from ..errors import ArgumentError
from ..ops.dispatch import why_unavailable

RANKS = (8, 16)


TOKENS = 8192  # of a model's layers


BUDGET_S = 120.0


COMPILE_SHARE = 0.6  # of the budget, at most


DESCRIPTION = """\
Try other launch configurations than the defaults, keep those that give the same result at least
2 % faster, and write them to a table for this GPU. Later runs use it; without it nothing is tuned
at run time. The results of the kernels change by rounding at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff tune`."""
    parser.description = DESCRIPTION
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 (default cuda)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="MxKxN",
        help="layers, tokens x in x out (default: those that `deltadiff bench layer` shows)",
    )  # fmt: skip
    sizes.add_argument(
        "--config", type=Path, metavar="FILE", help="the layers of a Hugging Face config.json"
    )
    parser.add_argument(
        "--tokens", type=_count, default=TOKENS, metavar="M",
        help=f"in a step, for --config (default {TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", nargs="+", type=_count, default=RANKS, metavar="R",
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


def _shape(text: str) -> tuple[int, int, int]:
    m, k, n = map(_count, text.split("x"))  # argparse words the ValueError
    return m, k, n


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ArgumentError: there is nothing to tune, or a table cannot be read or written.
    """
    device = _find_gpu(args.device)
    from ..kernels.runtime import tuned  # needs Triton

    gpu = torch.cuda.get_device_name(device)
    path = args.output or tuned.user_path(gpu)
    if args.remove:
        print(f"removed: {path}" if path.exists() else f"there is no {path}")
        path.unlink(missing_ok=True)
        return 0
    try:
        rows, shipped = tuned.load(path), tuned.load(tuned.shipped_path(gpu))
    except tuned.TableError as error:
        accepted = "a table that can be read; `deltadiff tune --remove` deletes the user's"
        raise ArgumentError("table", error, accepted) from error
    print(f"{gpu}, {len(rows)} rows in {path}", flush=True)
    new = set()  # two cases may ask for one configuration: what either found stays
    for finding in _findings(args, device):
        if finding.launch not in new:
            rows.pop(finding.launch, None)
        if finding.entries or (finding.launch in shipped and finding.launch not in new):
            rows[finding.launch] = finding.entries
            new.add(finding.launch)
        write(path, gpu, rows)  # after every one: an interrupted run keeps what it has
    tuned.use(device, None)
    print(f"{len(rows)} rows in {path}")
    return 0


def _find_gpu(name: str) -> torch.device:
    accepted = "an NVIDIA GPU with Triton; for others there is nothing to tune"
    if not torch.cuda.is_available():
        raise ArgumentError("device", f"{name!r}, and no NVIDIA GPU was found", accepted)
    device = find_device(name)
    reason = why_unavailable("triton", device, torch.bfloat16)
    if device.type != "cuda" or reason:
        raise ArgumentError("device", f"{name!r} ({reason or 'no GPU'})", accepted)
    return device


def _findings(args: argparse.Namespace, device: torch.device) -> Iterator:
    """What is found, printed as it comes, until the budget is spent."""
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
        except Exception as error:  # one that has no room, for one, must not cost the others
            print(f"left out: {case}: {failure(error)}", file=sys.stderr, flush=True)
            continue
        for finding in findings:
            print(f"{case}: {describe(finding)}", flush=True)
            yield finding
        free_memory(device)


def describe(finding) -> str:
    """A finding in words."""
    text = f"{finding.launch.op} {finding.default_s * 1e3:.3f} ms"
    if not finding.entries:
        return f"{text}, none of {finding.tried} is faster"
    changes = (f"{k} {finding.default[k]} -> {v}" for k, v in finding.entries.items())
    return f"{text}, {finding.speedup - 1:.1%} faster: {', '.join(changes)}"


def chosen_cases(args: argparse.Namespace) -> list:
    """Forward and backward of every layer and rank, and the updates of W."""
    from .sweep import Linear, Update

    dtype = NAMED_DTYPES[args.dtype]
    shapes = args.shapes or (*SHAPES, *GRAPHED)
    if args.config is not None:
        shapes = [(args.tokens, *sizes) for sizes in _layers(args.config)]
    cases = [
        Linear(*shape, r, dtype, backward)
        for r in _apart(args.ranks, 1)
        for shape in shapes
        for backward in (False, True)
    ]
    return cases + [
        Update(r, dtype, rounding) for r in _apart(args.ranks, 2) for rounding in ROUNDINGS
    ]


def _apart(ranks: Iterable[int], columns: int) -> list[int]:
    """The ranks that have rows of their own where a product has so many columns a rank."""
    from ..kernels.runtime.tuned import padded_rank

    return list({padded_rank(columns * r): r for r in ranks}.values())


def _layers(config: Path) -> list[tuple[int, int]]:
    """(in, out) of the model's linear layers, once each; its head is not adapted."""
    from ..bench.model import Settings, build_model

    _, model = build_model(torch.device("meta"), Settings(config=config))
    head = model.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return list(dict.fromkeys((m.in_features, m.out_features) for m in layers))


def write(path: Path, gpu: str, rows: dict) -> None:
    """Write a table, all of it or nothing.

    Raises:
        ArgumentError: the file cannot be written.
    """
    import triton

    from ..kernels.launch_configs import LAUNCH_CONFIGS
    from ..kernels.runtime.tuned import VERSION

    lines = [
        json.dumps(
            {
                "op": op,
                "key": dict(zip(LAUNCH_CONFIGS[op].keys, key, strict=True)),
                "config": entries,
            }
        )
        for (op, key), entries in sorted(rows.items())
    ]
    head = json.dumps({"version": VERSION, "gpu": gpu, "triton": triton.__version__})
    text = f'{head[:-1]}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"  # a row a line
    parts = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        parts.write_text(text)
        os.replace(parts, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            parts.unlink()
        raise ArgumentError(
            "--output", f"{path} ({error})", "a file that can be written"
        ) from error
