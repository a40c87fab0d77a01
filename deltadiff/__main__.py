"""The command `deltadiff`, also `python -m deltadiff`."""

import argparse
import importlib
import json
import os
import secrets
import shutil
import sys
from functools import partial
from pathlib import Path

from . import __version__
from .errors import ArgumentError, CheckpointError

EXIT_CODES = """\
exit codes:
  0    done; everything that was checked passed
  1    verify: a check failed; finetune, compare: training failed; bench: a variant failed
  2    an argument, a file or a device that cannot be used
  130  interrupted"""

FINETUNE_PACKAGES = ("transformers", "tqdm", "matplotlib")

# Files beside the weights that belong to the tokenizer, under the names that Hugging Face uses.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model", "*.bpe", "*.spm",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except ArgumentError as error:
        print(f"deltadiff: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deltadiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="deltadiff",
        description="Fused kernels for Delta-LoRA and DiffoRA fine-tuning.",
        epilog=EXIT_CODES,
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"deltadiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, formatter_class=plain
        )
        sub.set_defaults(run=run)
        return sub

    info = command("info", _info, "Show versions, devices, and which backend runs what.")
    info.add_argument("--json", action="store_true", help="print JSON")

    text = "Check the kernels of a machine against float64, beside eager PyTorch."
    _add_verify_arguments(command("verify", _verify, text))

    text = "Merge an adapter into its model and save an ordinary Hugging Face model."
    merge = command("merge", _merge, text)
    merge.add_argument("model", metavar="MODEL_FOLDER", help="the base model, as saved on disk")
    merge.add_argument("adapter", metavar="ADAPTER_FOLDER", help="what save_adapter wrote")
    merge.add_argument("output", metavar="OUTPUT", help="a new or empty folder")

    finetune = command("finetune", _finetune, "Fine-tune a model on text, with Delta-LoRA.")
    if argv[:1] == ["finetune"]:  # the other commands need none of its imports
        from .finetune.command import add_arguments

        add_arguments(finetune)

    text = "List the presets of finetune and compare, or what one of them sets."
    presets = command("presets", _presets, text)
    presets.add_argument("name", nargs="?", metavar="NAME", help="such as delta-lora/e2e")

    text = "Fine-tune with several methods and seeds, and put them side by side."
    compare = command("compare", _compare, text)
    if argv[:1] == ["compare"]:
        from .finetune.compare.command import add_arguments

        add_arguments(compare)

    bench = command("bench", _bench, "Time a layer, the optimizer step or a model, beside peers.")
    if argv[:1] == ["bench"]:
        from .bench.command import add_arguments

        add_arguments(bench)

    tune = command("tune", _tune, "Find faster launch configurations on this GPU and keep them.")
    if argv[:1] == ["tune"]:
        from .tuning.command import add_arguments

        add_arguments(tune)
    return parser


# ---------------------------------------------------------------- info, verify


def _info(args: argparse.Namespace) -> int:
    from .ops.info import collect, format_info

    found = collect()
    print(json.dumps(found, indent=1) if args.json else format_info(found))
    return 0


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    from .ops.dispatch import BACKENDS
    from .verify.run import OPERATIONS

    parser.description += """

An error is relative (Frobenius norm), against deltadiff.reference in float64. Accepted is
twice the error of eager PyTorch in the same dtype (three times for gradients) plus one
rounding; "worst" is the largest error of one element over its own limit. Where there is one
right answer every bit is compared, and the error is the share of elements that differ.
Shapes are tokens x in x out, and out x in."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument(
        "--op", nargs="+", action="extend", choices=tuple(OPERATIONS), metavar="OP",
        help=f"only these of {', '.join(OPERATIONS)}",
    )  # fmt: skip
    parser.add_argument("--backend", choices=BACKENDS, help="instead of the one that is chosen")
    parser.add_argument("--quick", action="store_true", help="small shapes, no mixed dtypes")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a new one, printed)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _verify(args: argparse.Namespace) -> int:
    from .devices import find_device
    from .verify.run import run
    from .verify.tolerance import format_table

    device = find_device(args.device)
    seed = secrets.randbits(31) if args.seed is None else args.seed
    if not args.json:
        print(f"deltadiff {__version__}, verify on {device}, seed {seed}", flush=True)
    rows, ok = run(device, args.op, args.backend, args.quick, seed)
    if args.json:
        report = {"version": __version__, "device": str(device), "seed": seed, "ok": ok}
        print(json.dumps({**report, "rows": [row.as_dict() for row in rows]}, indent=1))
    else:
        print(format_table(rows))
    return 0 if ok else 1


# ---------------------------------------------------------------- merge


def _merge(args: argparse.Namespace) -> int:
    from .finetune.models import find_model
    from .layers.merge import merge_

    adapter, output = Path(args.adapter), Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError("OUTPUT", f"{output}, which is not empty", "a new or an empty folder")
    place, labels = find_model(args.model), _labels(adapter)
    model, tokenizer = _load_with_adapter(args.model, place, adapter, labels)
    print(merge_(model))
    parts = output.with_name(f".{output.name}.{os.getpid()}")  # renamed when all of it is there
    try:
        model.save_pretrained(parts)
        if place.is_dir():
            for file in (file for pattern in TOKENIZER_FILES for file in place.glob(pattern)):
                shutil.copy(file, parts)
        else:
            tokenizer.save_pretrained(parts)
        os.replace(parts, output)
    except OSError as error:
        raise ArgumentError("OUTPUT", f"{output} ({error})", "a folder that can be made") from error
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    print(f"saved in {output}")
    return 0


def _labels(adapter: Path) -> tuple[str, ...]:
    """The classes of the head that was trained beside the adapter, if there is one."""
    path = adapter / "adapter.json"
    try:
        config = json.loads(path.read_bytes())
        shapes = [config["base"][name] for name in config["saved"]]
        rows = [shape[0] for shape in shapes if len(shape) == 2]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(str(path), error, "a file that save_adapter wrote") from error
    return tuple(str(i) for i in range(min(rows, default=0)))


def _load_with_adapter(name: str, place: Path, adapter: Path, labels: tuple[str, ...]):
    """(model with the adapter on it, tokenizer), in the class that the adapter was made for.

    That is the class in the model's config, or the one in which `deltadiff finetune` loads it.
    """
    from .finetune.models import load_model
    from .finetune.tasks.classes import ClassTask
    from .finetune.tasks.spans import SpanTask
    from .finetune.tasks.text import TextTask
    from .layers.adapter_file import load_adapter

    def as_configured():
        return _load_configured(place), None

    def as_finetuned(task):
        loaded = load_model(name, task, dtype="auto")
        return loaded.module, loaded.tokenizer

    order = [as_configured] if place.is_dir() else []
    if labels:
        order = [partial(as_finetuned, task) for task in (ClassTask(labels), SpanTask())] + order
    else:
        order.append(partial(as_finetuned, TextTask()))
    errors = []
    for load in order:
        try:
            model, tokenizer = load()
            load_adapter(model, adapter)
            return model, tokenizer
        except ArgumentError as error:
            errors.append(error)
    raise errors[0]


def _load_configured(folder: Path):
    transformers = _need("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        names = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        return kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        accepted = "a model that transformers saved"
        raise ArgumentError("MODEL_FOLDER", f"{folder} ({error})", accepted) from error


# ---------------------------------------------------------------- finetune


def _presets(args: argparse.Namespace) -> int:
    from .finetune.presets import describe, overview

    print(describe(args.name) if args.name else overview())
    return 0


def _compare(args: argparse.Namespace) -> int:
    from .finetune.compare.command import run

    for package in FINETUNE_PACKAGES:
        _need(package)
    return run(args)


def _finetune(args: argparse.Namespace) -> int:
    from .finetune.command import run

    for package in FINETUNE_PACKAGES:  # before the training, not after it
        _need(package)
    return run(args)


def _bench(args: argparse.Namespace) -> int:
    from .bench.command import run

    return run(args)


def _tune(args: argparse.Namespace) -> int:
    from .tuning.command import run

    return run(args)


def _need(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        accepted = f'an installed {package}: pip install "deltadiff[finetune]"'
        raise ArgumentError(package, f"nothing ({error})", accepted) from error


def _leave_checkout() -> None:
    """`python -m` looks in the current folder first. In a checkout the folder `kernels` is there,
    and transformers would take it for the package of that name."""
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != checkout]


if __name__ == "__main__":
    _leave_checkout()
    sys.exit(main())
