"""`deltadiff finetune`: fine-tune a real model on real text, measured before and after.

Text with labels trains a classifier or a regression, and questions whose answers are spans of a
text train a model that finds them (an encoder or a decoder with a new linear head). Other text
trains a causal language model; of a conversation, the assistant's answers are learnt.

The output folder holds result.json, settings.json, inputs.json (the text and the model by SHA-256),
predictions.csv (and completions.csv), what was trained, and figures of the loss, the metrics and
the similarity of weights. While a run lasts it also holds a lock and the last two checkpoints.
"""

import argparse
import sys
from pathlib import Path

import torch

from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import as_folder
from ..loop import end_on_sigterm, exit_code
from . import presets, report
from .options import add_settings, given_settings, require_model_and_data
from .packages import check_packages
from .run import can_go_on, finetune
from .settings import Settings, make_settings, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff finetune`. Those not given stay out of the namespace."""
    add_settings(parser)
    parser.add_argument("--resume", metavar="OUTPUT", help="go on with the run in this folder")
    text = "with --resume: go on although settings, text or model are others than at the start"
    parser.add_argument("--accept-changes", action="store_true", help=text)
    parser.add_argument("--eager", action="store_true", help="short for --method lora-peft")
    parser.add_argument("--show", action="store_true", help="print what --preset sets, and stop")


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code, see `deltadiff --help`."""
    check_packages()
    with end_on_sigterm() as received:
        try:
            return _run(args)
        except KeyboardInterrupt:  # outside of the training, where there is nothing to save
            print("stopped")
            return exit_code(received)


def _run(args: argparse.Namespace) -> int:
    output = None
    try:
        if args.show:
            print(presets.describe(getattr(args, "preset", "") or ""))
            return 0
        settings = settings_from(args)
        output = settings.output
        result = finetune(
            settings, resume=args.resume is not None, accept_changes=args.accept_changes
        )
        print(report.summary(result))
        return int(bool(result["failed"]))
    except Interrupted as stop:
        print(f"stopped; saved in {stop}\n{_to_go_on(output)}")
        return exit_code([stop.number])
    except KeyboardInterrupt:
        if output is not None and can_go_on(Path(output)):
            print(_to_go_on(output))
        raise
    except ArgumentError as error:
        print(f"deltadiff finetune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, torch.OutOfMemoryError, OSError) as error:
        print(
            f"deltadiff finetune: {(str(error) or type(error).__name__).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1


def _to_go_on(output: str | None) -> str:
    return f"to go on: deltadiff finetune --resume {output}"


def settings_from(args: argparse.Namespace) -> Settings:
    """The settings that the command line asks for.

    Raises:
        ArgumentError: options are missing, or contradict each other.
    """
    given = given_settings(args)
    if args.resume is not None:
        if given:
            first = next(iter(given))
            raise ArgumentError("resume", f"also {first}={given[first]}", "--resume OUTPUT alone")
        return read_settings(as_folder("resume", args.resume))
    if args.accept_changes:
        raise ArgumentError("accept_changes", "no run to resume", "--resume OUTPUT beside it")
    require_model_and_data(given, "deltadiff finetune MODEL DATA, or --resume OUTPUT")
    if args.eager:
        if given.get("method", "lora") not in ("lora", "lora-peft"):
            raise ArgumentError("eager", f"method {given['method']}", "lora, which PEFT has")
        given["method"] = "lora-peft"
    return make_settings(given)
