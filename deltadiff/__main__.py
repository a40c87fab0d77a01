"""The command `deltadiff`, also `python -m deltadiff`.

This file holds the table of the commands. The arguments of a command and what it does are in the
module that the table names.
"""

import argparse
import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

from .errors import ArgumentError

EXIT_CODES = """\
exit codes:
  0    done; everything that was checked passed
  1    verify: a check failed; finetune, compare: training failed; bench: a variant failed
  2    an argument, a file or a device that cannot be used
  130  interrupted"""

# Each command with its module and what its help says. The module has `add_arguments(parser)` and
# `run(args)`, which returns the exit code.
COMMANDS = {
    "info": ("ops.info", "Show versions, devices, and which backend runs what."),
    "verify": (
        "verify.command",
        "Check the kernels of a machine against float64, beside eager PyTorch.",
    ),
    "merge": (
        "finetune.merge_command",
        "Merge an adapter into its model and save an ordinary Hugging Face model.",
    ),
    "finetune": ("finetune.command", "Fine-tune a model on text, with Delta-LoRA."),
    "presets": (
        "finetune.presets",
        "List the presets of finetune and compare, or what one of them sets.",
    ),
    "compare": (
        "finetune.compare.command",
        "Fine-tune with several methods and seeds, and put them side by side.",
    ),
    "bench": ("bench.command", "Time a layer, the optimizer step or a model, beside peers."),
    "theory": (
        "diffora.theory.command",
        "Measure DiffoRA's theorems 1 and 2 on a small network, in a minute on a CPU.",
    ),
    "tune": (
        "tuning.command",
        "Find faster launch configurations on this GPU and keep them.",
    ),
}


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
    """The parser of all commands, of which only the one in ``argv`` has its arguments.

    A command's arguments need the imports of its module, which the other commands do without.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="deltadiff",
        description="Fused kernels for Delta-LoRA and DiffoRA fine-tuning.",
        epilog=EXIT_CODES,
        formatter_class=plain,
    )
    version = f"deltadiff {metadata.version('deltadiff')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    named = next((word for word in argv if word in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text, epilog=EXIT_CODES, formatter_class=plain
        )
        if name == named:
            room = importlib.import_module(f".{module}", __package__)
            room.add_arguments(command)
            command.set_defaults(run=room.run)
    return parser


def _leave_checkout() -> None:
    """Take the current folder off the path when it is a checkout.

    `python -m` looks in the current folder first. A checkout has a folder `kernels`, and
    transformers would take it for the package of that name.
    """
    checkout = Path(__file__).resolve().parent.parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != checkout]


if __name__ == "__main__":
    _leave_checkout()
    sys.exit(main())
