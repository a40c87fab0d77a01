"""`deltadiff bench`: time and memory of a layer, a step, a model or a search, beside peers."""

import argparse
import dataclasses
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..checks import NAMED_DTYPES, need_package
from ..devices import default_device, environment, find_device, free_memory
from ..errors import ArgumentError
from ..files import as_folder, make_folder
from . import blocks, layer, model, quantised, search, step
from .arguments import count, shape
from .checkpointing import OFFLOADING
from .methods import Settings
from .models import BASES, PRESETS
from .own_process import PEERS, why_no_peer
from .peers import has_peft
from .records import failed, write
from .report import format_table, variant_text
from .timing import BUDGET_S, QUICK_BUDGET_S, Case, compare

HOW_TO_READ = """\
Variants of one case take turns; p20, p50 and p80 are quantiles of a call's time. "x floor" is the
median over that of the first variant: a frozen linear layer or model (forward, backward to its
input), or a copy of as many bytes as the step has to move. "host ms" is what the host needs to
issue a call, "MiB" what a call allocates at its peak (for a model: all of its memory). "graph"
means that the call was captured in a CUDA graph."""


LAYER_VARIANTS = tuple(dict.fromkeys(layer.VARIANTS + quantised.VARIANTS + blocks.VARIANTS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `deltadiff bench layer|step|model|search`."""
    whats = parser.add_subparsers(title="what", dest="what", required=True, metavar="WHAT")

    def what(name: str, text: str, variants: tuple[str, ...]) -> argparse.ArgumentParser:
        plain = argparse.RawDescriptionHelpFormatter
        sub = whats.add_parser(
            name, help=text, description=text, epilog=HOW_TO_READ, formatter_class=plain
        )
        sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
        sub.add_argument("--quick", action="store_true", help="few cases, short rounds")
        sub.add_argument("--output", metavar="FOLDER", help="write JSON and plots there")
        sub.add_argument(
            "--variants", nargs="+", choices=variants, metavar="NAME",
            help=f"only these of {', '.join(variants)}; the floor is always measured",
        )  # fmt: skip
        return sub

    _add_layer_arguments(what("layer", "LoRA linear layers, and blocks of them.", LAYER_VARIANTS))
    what("step", "The optimizer step of Delta-LoRA and its parts.", step.VARIANTS)
    text = "Training steps of a whole model with random weights, Llama-2-7B's shape on a GPU."
    _add_model_arguments(what("model", text, model.VARIANTS))
    text = "A step of DiffoRA's search on a model with random weights."
    what("search", text, search.VARIANTS)


def _add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", type=shape, metavar="MxKxN",
        help="tokens x in x out; this, --ranks or --dtype replaces the default cases",
    )  # fmt: skip
    parser.add_argument("--ranks", nargs="+", type=count, metavar="R", help=f"default {layer.RANK}")
    parser.add_argument("--dtype", choices=NAMED_DTYPES, help="default bfloat16")
    parser.add_argument(
        "--base", choices=("dense", *quantised.BASES), default="dense",
        help="the frozen weight: of --dtype (dense, the default), or quantised",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", action="store_true",
        help="only the blocks: q, k and v behind their norm, and a gated MLP",
    )  # fmt: skip
    parser.add_argument(
        "--compile-seconds", type=float, default=20.0, metavar="S",
        help="leave torch.compile out once it has taken this long (default 20)",
    )  # fmt: skip


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a Hugging Face config.json")
    parser.add_argument("--preset", choices=PRESETS, help="the shape of a known model instead")
    parser.add_argument(
        "--liger", action="store_true", default=None,
        help="Liger's kernels for the rest of the model, in every method",
    )  # fmt: skip
    parser.add_argument(
        "--base", choices=BASES, help="how the weights of linear layers are stored (default bf16)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS,
        help="these libraries too, each in a process of its own",
    )  # fmt: skip
    for name in ("steps", "batch", "sequence", "r"):
        text = f"default {getattr(Settings, name)} (on a CPU it may be less)"
        parser.add_argument(f"--{name}", type=count, metavar="N", help=text)
    parser.add_argument("--dtype", choices=NAMED_DTYPES, help="default bfloat16 (on a CPU float32)")
    parser.add_argument(
        "--adapter-dtype", choices=NAMED_DTYPES, help="of deltadiff's adapters (default float32)"
    )
    parser.add_argument("--targets", nargs="+", choices=model.TARGETS, help="layers to adapt")
    parser.add_argument(
        "--checkpointing", choices=("off", "on", "both"),
        help="gradient checkpointing (default both; with --offload on)",
    )  # fmt: skip
    parser.add_argument(
        "--offload", choices=OFFLOADING,
        help="keep what checkpointing keeps in the host's memory, as this library does it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 1 if a variant failed for another reason than memory."""
    output = None if args.output is None else as_folder("output", args.output)
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        accepted = "an installed matplotlib for --output: pip install -e '.[finetune]'"
        raise ArgumentError("matplotlib", "nothing", accepted)
    if output is not None:
        make_folder("output", output)  # before anything is measured, which would be lost
    device = find_device(args.device or default_device())
    where = environment(device)
    versions = f"torch {where['torch']}, Triton {where['triton']}, {where['threads']} threads"
    print(f"{where['gpu']}, {versions}", flush=True)
    if not has_peft() and args.what in ("layer", "model"):
        print("left out: PEFT, which is not installed")
    records, paths = [], []
    for found in (_measure_model if args.what == "model" else _measure_cases)(args, device):
        records += found
        for r in found:
            if failed(r):
                print(f"failed: {variant_text(r)}: {r['note']}", file=sys.stderr, flush=True)
        if output is not None:  # after every case: an interrupted run keeps what it has
            paths = write(records, output, device)
    print(format_table(records))
    if output is not None:
        from .plots import write_plots  # matplotlib

        paths += write_plots([{**r, **where} for r in records], output)
        print("\n".join(f"written: {path}" for path in paths))
    return int(any(map(failed, records)))


def _measure_cases(args: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """Yield the records of one case after another."""
    budget = QUICK_BUDGET_S if args.quick else BUDGET_S
    compile_left = getattr(args, "compile_seconds", 0.0)
    cases = _chosen_cases(args, device)
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case}", file=sys.stderr, flush=True)
        wanted = args.variants
        if compile_left <= 0 and args.what == "layer":
            wanted = [name for name in wanted or LAYER_VARIANTS if name != layer.COMPILED]
        start = time.perf_counter()
        found = compare(case, device, wanted, budget)
        if any(r["variant"] == layer.COMPILED for r in found):
            compile_left -= time.perf_counter() - start
        free_memory(device)
        yield found
    if compile_left <= 0 and args.what == "layer":
        print(f"left out: {layer.COMPILED} of the last cases, for time (see --compile-seconds)")


def _chosen_cases(args: argparse.Namespace, device: torch.device) -> list[Case]:
    if args.what == "step":
        return step.step_cases(device, args.quick)
    if args.what == "search":
        return search.search_cases(device, args.quick)
    if args.blocks:
        only = {"--base": args.base != "dense", "--shapes": args.shapes, "--ranks": args.ranks}
        for option in (name for name, given in {**only, "--dtype": args.dtype}.items() if given):
            raise ArgumentError("--blocks", f"{option} beside it", "one of the two")
        return _block_cases(True, device, args.quick)
    if args.base != "dense":
        base = quantised.BASES[args.base]
        if base.package is not None:
            need_package(base.package, extra=None, argument="--base")
        if args.dtype not in (None, "bfloat16"):
            raise ArgumentError("--dtype", args.dtype, f"bfloat16 beside --base {args.base}")
        return quantised.quantised_cases(base, device, args.shapes, args.ranks, args.quick)
    if args.shapes or args.ranks or args.dtype:
        dtype = NAMED_DTYPES[args.dtype or "bfloat16"]
        return layer.layer_cases_of(device, args.shapes, args.ranks, dtype)
    return layer.layer_cases(device, args.quick) + _block_cases(False, device, args.quick)


def _block_cases(asked: bool, device: torch.device, quick: bool) -> list[Case]:
    """The cases of blocks, which are transformers'; without it they are left out, or refused."""
    if importlib.util.find_spec("transformers") is None and not asked:
        print("left out: blocks, for transformers is not installed")
        return []
    need_package("transformers", extra="finetune", argument="--blocks")
    return blocks.block_cases(device, quick)


def _measure_model(args: argparse.Namespace, device: torch.device) -> Iterator[list[dict]]:
    """Yield the record of one method after another."""
    chosen = {}
    for f in dataclasses.fields(Settings):
        value = getattr(args, f.name)
        if value is not None and f.name != "peers":
            chosen[f.name] = NAMED_DTYPES.get(value, value)
    reasons = {name: why_no_peer(name) for name in args.peers or ()}
    chosen["peers"] = tuple(name for name, reason in reasons.items() if reason is None)
    for name, reason in reasons.items():
        if reason is not None:
            print(f"left out: {name}, for {reason}")
    if args.quick:
        chosen["steps"] = 1
    asked = args.checkpointing or ("both" if args.offload is None else "on")
    checkpointing = {"off": (False,), "on": (True,), "both": (False, True)}[asked]
    if args.offload is not None and asked == "off":
        raise ArgumentError("--offload", "--checkpointing off beside it", "on, or both")
    targets = args.targets or (("all",) if args.quick else tuple(model.TARGETS))
    settings = model.settings_for(device, **chosen)
    for r in model.model_records(device, settings, targets, checkpointing, args.variants):
        took = "" if r["p50_ms"] is None else f" {r['p50_ms']:.0f} ms"
        words = (r["targets"], variant_text(r), r["rounding"], "checkpointing" * r["checkpointing"])
        print(" ".join(filter(None, words)) + took, file=sys.stderr, flush=True)
        yield [r]
