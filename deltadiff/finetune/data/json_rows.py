"""Rows of JSON: an object on each line, or one array of objects."""

import json
import re
from collections.abc import Iterator

from ...errors import ArgumentError
from .source import Row, Source

_SPACE = re.compile(r"[ \t\r\n]*")
ACCEPTED = "a JSON object for each example: one on each line, or all in an array"


def jsonl_rows(source: Source) -> Iterator[Row]:
    """Rows of a file that has an object on each line."""
    with source.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = source.place(number)
                yield _row(place, parse(line.rstrip(), place))


def array_rows(source: Source, text: str) -> Iterator[Row]:
    """Rows of a text that is one array of objects.

    Each element is decoded by itself, so that its line is known.
    """
    at, line, counted = _skip_space(text, 0) + 1, 1, 0
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        place = source.place(line)
        if text.startswith("]", at):
            break
        value, at = _decode(text, at, source, place)
        yield _row(place, value)
        at = _skip_space(text, at)
        if text.startswith(",", at):
            at += 1
        elif not text.startswith("]", at):
            place = source.place(line + text.count("\n", counted, at))
            given = f"{place}: {text[at : at + 20]!r} after an element"
            raise ArgumentError("data", given, "a comma, or the end of the array")
    if text[at + 1 :].strip():
        raise ArgumentError("data", f"{place}: more text after the array", ACCEPTED)


def parse(text: str, place: str):
    """The JSON value in some text; ``place`` is where it stands.

    Raises:
        ArgumentError: it is not JSON; or nested too deep, or with a number too long for Python.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        given = f"{place}{line}, character {error.colno}: {error.msg}"
        raise ArgumentError("data", given, ACCEPTED) from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError("data", f"{place}: {error}", ACCEPTED) from error


def _decode(text: str, at: int, source: Source, place: str) -> tuple[object, int]:
    """The JSON value that begins at ``at``, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError as error:
        given = f"{source.place(error.lineno)}, character {error.colno}: {error.msg}"
        raise ArgumentError("data", given, ACCEPTED) from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError("data", f"{place}: {error}", ACCEPTED) from error


def _row(place: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise ArgumentError("data", f"{place}: {json.dumps(value):.60}", ACCEPTED)
    return Row(place, value)


def _skip_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()
