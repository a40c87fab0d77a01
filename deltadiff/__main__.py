"""The command `deltadiff`, also `python -m deltadiff`.

This file holds the table of the commands. The arguments of a command and what it does are in the
module that the table names.
"""

import argparse
import importlib
import io
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from .errors import ArgumentError

EXIT_CODES = """\
exit codes:
  0    done; everything that was checked passed
  1    verify: a check failed; finetune, compare: training failed, or a part of what comes after it;
       bench: a variant failed
  2    an argument, a file or a device that cannot be used
  3    compare: its --time-limit is over; the same command goes on
  130  interrupted by Ctrl-C; finetune and compare save first what can be saved
  143  the same, by SIGTERM"""

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
    _open_streams()
    # Figures go to files. What a notebook has set here need not be installed.
    os.environ["MPLBACKEND"] = "agg"
    leave = None
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed the help, or what is wrong
        leave = stop
    lost = _flush()
    if lost is not None:
        return lost
    if leave is not None:
        raise leave
    return code


def _run(argv: list[str]) -> int:
    """Run the command, and say in one line what cannot be used.

    Errors that nobody expects keep their traceback: they are mistakes of deltadiff.
    """
    try:
        for word in argv:
            _check_word(word)
        args = _parser(argv).parse_args(argv)
        return args.run(args)
    except ArgumentError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("deltadiff: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        return 1
    except OSError as error:  # a full disk, a folder of somebody else's; it names the file
        return _refuse(str(error) or type(error).__name__)
    except MemoryError as error:
        return _refuse(f"not enough memory ({error})")


def _refuse(text: str) -> int:
    print(f"deltadiff: {' '.join(text.split())}", file=sys.stderr)
    return 2


def _check_word(word: str) -> None:
    """Raise ArgumentError for a word that nothing could write into a file, or argparse garbles."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        accepted = "text in the encoding of the locale; a file with such a name has to be renamed"
        raise ArgumentError("argument", ascii(word), accepted) from error
    if word.startswith("--") and word.endswith("=--"):  # argparse takes it for an empty list
        raise ArgumentError("argument", word, "a value after the equals sign")


# ------------------------------------------------------------------- stdout and stderr


def _open_streams() -> None:
    """Make stdout and stderr take every text, also where the caller has closed them.

    What is printed to a closed stream is lost. Without this it could land in a file that deltadiff
    writes, because the next file that a process opens gets the number of the closed stream.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # ASCII may be all that the locale has
            stream.reconfigure(errors="backslashreplace")


def _flush() -> int | None:
    """Write out what was printed; the exit code where that cannot be, as on a full disk."""
    code = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            # Python would try again when it ends, and print a message of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1 if stream is sys.stdout else 2)
            code = 1
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                code = _refuse(f"stdout: {error}")
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, whatever the words have in them."""

    def error(self, message: str) -> NoReturn:
        super().error(" ".join(message.split()))


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of all commands, of which only the one in ``argv`` has its arguments.

    A command's arguments need the imports of its module, which the other commands do without.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
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
