"""The JSON files of DiffoRA, which hold a value for each candidate.

The value of a file is an object with ``format``, ``version`` and ``layers``: an object for each
layer, which holds a value for each of its module types.
"""

import abc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import ArgumentError, CheckpointError
from ..files import reading, write_text
from .candidates import Candidates

VERSION = 1
T = TypeVar("T", bound="JsonFile")
Value = TypeVar("Value")


class JsonFile(abc.ABC):
    """`save` and `load` for a class that has ``to_json`` and ``from_json``."""

    @abc.abstractmethod
    def to_json(self) -> dict:
        """The plain data of the JSON file."""

    @classmethod
    @abc.abstractmethod
    def from_json(cls: type[T], data: object) -> T:
        """Parse what `to_json` gave; ArgumentError where something else is in the data."""

    def save(self, path: str | os.PathLike) -> None:
        """Write a JSON file, atomically; `load` makes an equal object of it."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1))

    @classmethod
    def load(cls: type[T], path: str | os.PathLike) -> T:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, garbled or foreign.
        """
        with reading(Path(path), "a JSON file that `save` wrote"):
            data = json.loads(Path(path).read_bytes())
        try:
            return cls.from_json(data)
        except ArgumentError as error:
            given = f"{error.argument}: {error.given}"
            raise CheckpointError(str(path), given, error.accepted) from None


def nest_by_layer(candidates: Candidates, value: Callable[[str, int, int], object]) -> dict:
    """``{layer: {module type: value(full name, row, column)}}`` for all candidates."""
    table: dict[str, dict] = {layer: {} for layer in candidates.layers}
    for name, (i, j) in candidates.places.items():
        table[candidates.layers[i]][candidates.types[j]] = value(name, i, j)
    return table


def parse_table(
    data: object, form: str, kinds: tuple[type[Value], ...]
) -> tuple[Candidates, list[dict[str, Value]]]:
    """The candidates of a table of format ``form``, and the values of each layer by module type.

    Raises:
        ArgumentError: the data is no such table, or a value has none of the types ``kinds``.
    """
    accepted = f"an object of format {form!r}, version {VERSION}"
    if not isinstance(data, dict):
        raise ArgumentError("format", type(data).__name__, accepted)
    if data.get("format") != form or data.get("version") != VERSION:
        given = f"{data.get('format')!r}, version {data.get('version')}"
        raise ArgumentError("format", given, accepted)
    table = data.get("layers")
    if not isinstance(table, dict) or not table:
        raise ArgumentError("layers", f"{table!r:.60}", "an object with an entry for each layer")
    for layer, row in table.items():
        if not isinstance(row, dict) or not row:
            raise ArgumentError(layer, f"{row!r:.60}", "an object with an entry for each module")
        for kind, value in row.items():
            if type(value) not in kinds:
                accepted = " or ".join(k.__name__ for k in kinds)
                raise ArgumentError(f"{layer}.{kind}", f"{value!r:.60}", accepted)
    return Candidates(tuple(table), tuple(tuple(row) for row in table.values())), [*table.values()]
