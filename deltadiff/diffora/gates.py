"""What stage 1 of DiffoRA is about: the candidates, their gates, and the selection made from them.

All three are tables with a row for each layer of the model's stack and a column for each module
type, and are plain data: names and numbers, without tensors.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_number
from ..errors import ArgumentError, ArgumentTypeError, CheckpointError
from ..files import write_bytes
from ..layers.targets import Targets, choose_modules, is_peft

T = TypeVar("T")


VERSION = 1


class _JsonFile:
    """`save` and `load` for what has `to_json` and `from_json`."""

    def save(self, path: str | os.PathLike) -> None:
        """Write as JSON, atomically; all that it is made of is in the file."""
        write_bytes(Path(path), json.dumps(self.to_json(), indent=1).encode())

    @classmethod
    def load(cls: type[T], path: str | os.PathLike) -> T:
        """Read what `save` wrote.

        Raises:
            CheckpointError: a file that is missing, garbled or foreign.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_bytes()))
        except ArgumentError as error:
            given = f"{error.argument}: {error.given}"
            raise CheckpointError(str(path), given, error.accepted) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(str(path), error, "a JSON file that `save` wrote") from None


@dataclass(frozen=True)
class Candidates:
    """The layers of a stack, and in each the linear modules that may get a low-rank pair.

    Attributes:
        layers: names of the layers, such as "bert.encoder.layer.0".
        modules: for each layer, the names inside of it, such as "attention.self.query". Such a name
            is a module type.
        outside: linear layers that were asked for but stand in no stack; DiffoRA leaves them alone.
    """

    layers: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...] = field(default=(), compare=False)

    @property
    def types(self) -> tuple[str, ...]:
        """All module types, in the order in which they first appear."""
        return tuple(dict.fromkeys(t for types in self.modules for t in types))

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """Whole name of each candidate -> (index of its layer, index of its type)."""
        column = {t: j for j, t in enumerate(self.types)}
        return {
            f"{layer}.{t}": (i, column[t])
            for i, (layer, types) in enumerate(zip(self.layers, self.modules, strict=True))
            for t in types
        }


def find_candidates(
    model: nn.Module, target_modules: Targets = "all-linear", modules_to_save=()
) -> Candidates:
    """The linear modules of each layer in the model's stacks.

    A stack is an outermost ``nn.ModuleList`` whose elements hold linear modules, as in BERT,
    RoBERTa, DeBERTa, GPT-2, Llama and Qwen. Its layers may differ in their modules.

    Args:
        model: an eager model.
        target_modules, modules_to_save: as for `swap_`.

    Raises:
        ArgumentTypeError, ArgumentError: no module that stands in a stack; a layer with one module
            only, among which there is nothing to choose; PEFT layers.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    chosen = choose_modules(model, target_modules, modules_to_save)
    lists = {
        name
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.ModuleList)
    }
    layers: dict[str, list[str]] = {}
    outside, seen = [], set()
    for name, module in chosen.items():
        if is_peft(module):
            raise ArgumentTypeError("model", f"PEFT's layer {name}", "an eager model")
        if id(module) in seen:  # one module in two places has one gate
            continue
        seen.add(id(module))
        layer, kind = _split(name, lists)
        if kind:
            layers.setdefault(layer, []).append(kind)
        else:
            outside.append(name)
    if not layers:
        given = f"{target_modules!r:.60}, which names no module of a stack of layers"
        raise ArgumentError("target_modules", given, "linear modules inside of an nn.ModuleList")
    for layer, types in layers.items():
        if len(types) < 2:
            given = f"one module in {layer}: {types[0]}"
            raise ArgumentError("target_modules", given, "at least two modules in each layer")
    return Candidates(tuple(layers), tuple(map(tuple, layers.values())), tuple(outside))


def _split(name: str, lists: set[str]) -> tuple[str, str]:
    """A module's layer and its name inside of it, which is empty outside of stacks."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if ".".join(parts[:i]) in lists:
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return "", ""


@dataclass(frozen=True)
class GateMatrix(_JsonFile):
    """The relaxed matrix of gates (DiffoRA eq. 11), a row for each layer.

    Attributes:
        candidates: which layers and modules.
        values: for each layer one entry a module type in [0, 1]; None where the layer has no such
            module.
    """

    candidates: Candidates
    values: tuple[tuple[float | None, ...], ...]

    @classmethod
    def from_tensor(cls, candidates: Candidates, values: Tensor) -> "GateMatrix":
        """Of a (layers, types) tensor, whose entries without a module are not looked at."""
        table: list[list] = [[None] * len(candidates.types) for _ in candidates.layers]
        numbers = values.detach().tolist()
        for i, j in candidates.places.values():
            table[i][j] = numbers[i][j]
        return cls(candidates, tuple(map(tuple, table)))

    def __post_init__(self):
        shape = (len(self.candidates.types),) * len(self.candidates.layers)
        if tuple(map(len, self.values)) != shape:
            given = f"rows of {', '.join(str(len(row)) for row in self.values)}"
            raise ArgumentError("values", given, f"{len(shape)} rows of {shape[0]}")
        for name, (i, j) in self.candidates.places.items():
            value = self.values[i][j]
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(f"gate of {name}", value, "a number from 0 to 1")

    def discretise(self, ratio: float) -> "Selection":
        """Keep the K = floor(ratio N) largest gates of each layer (eq. 14).

        Exactly K, also where gates are equal: the module that comes first in the layer goes first.

        Args:
            ratio: rho, in (0, 1], with ratio N >= 1 for the N modules of every layer. A product
                that misses a whole number by rounding only (0.7 * 10, 2/3 * 6) counts as it.

        Raises:
            ArgumentTypeError, ArgumentError: another ratio.
        """

        def largest(i: int, types: tuple[str, ...], k: int) -> list[str]:
            gates = dict(zip(self.candidates.types, self.values[i], strict=True))
            return sorted(types, key=lambda t: -gates[t])[:k]  # a stable sort

        return _select(self.candidates, ratio, largest, self)

    def to_json(self) -> dict:
        table = _nest(self.candidates, lambda _, i, j: self.values[i][j])
        return {"format": "deltadiff-gates", "version": VERSION, "layers": table}

    @classmethod
    def from_json(cls, data: object) -> "GateMatrix":
        candidates, table = _parse(data, "deltadiff-gates", (int, float))
        column = {t: j for j, t in enumerate(candidates.types)}
        rows = [[None] * len(column) for _ in candidates.layers]
        for row, gates in zip(rows, table, strict=True):
            for t, value in gates.items():
                row[column[t]] = float(value)
        return cls(candidates, tuple(map(tuple, rows)))


@dataclass(frozen=True)
class Selection(_JsonFile):
    """Which candidates get a low-rank pair of their own in stage 2.

    Attributes:
        candidates: among which were chosen.
        selected: whole names.
        ratio: rho, the share of each layer that was asked for.
        gates: what the choice was made by; None for a random one.
    """

    candidates: Candidates
    selected: frozenset[str]
    ratio: float
    gates: GateMatrix | None = None

    def __post_init__(self):
        unknown = sorted(self.selected - set(self.candidates.places))
        if unknown:
            raise ArgumentError("selected", unknown[0], "names of candidates")

    @property
    def others(self) -> tuple[str, ...]:
        """The candidates that were not selected."""
        return tuple(name for name in self.candidates.places if name not in self.selected)

    def to_json(self) -> dict:
        table = _nest(self.candidates, lambda name, i, j: name in self.selected)
        return {
            "format": "deltadiff-selection",
            "version": VERSION,
            "ratio": self.ratio,
            "layers": table,
            "gates": None if self.gates is None else self.gates.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> "Selection":
        candidates, table = _parse(data, "deltadiff-selection", (bool,))
        pairs = zip(candidates.layers, table, strict=True)
        selected = {f"{layer}.{t}" for layer, row in pairs for t, chosen in row.items() if chosen}
        gates = None if data.get("gates") is None else GateMatrix.from_json(data["gates"])
        ratio = check_ratio(data.get("ratio"))
        return cls(candidates, frozenset(selected), ratio, gates)


def random_selection(candidates: Candidates, ratio: float, seed: int = 0) -> Selection:
    """K modules of each layer at random: the control of DiffoRA's table 3.

    Raises:
        ArgumentTypeError, ArgumentError: a ratio that `GateMatrix.discretise` refuses.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(i: int, types: tuple[str, ...], k: int) -> list[str]:
        return [types[j] for j in torch.randperm(len(types), generator=generator)[:k]]

    return _select(candidates, ratio, some, None)


def check_ratio(ratio: object) -> float:
    if not 0 < check_number("ratio", ratio) <= 1:
        raise ArgumentError("ratio", ratio, "a share in (0, 1]")
    return float(ratio)


def _select(candidates: Candidates, ratio: float, choose: Callable, gates) -> Selection:
    ratio, selected = check_ratio(ratio), set()
    for i, (layer, types) in enumerate(zip(candidates.layers, candidates.modules, strict=True)):
        k = math.floor(ratio * len(types) + 1e-9)  # rounding is far below, a real share far above
        if k < 1:
            given = f"{ratio} of {len(types)} modules in {layer}, which is less than one"
            raise ArgumentError("ratio", given, f"{1 / len(types):.3g} to 1")
        selected |= {f"{layer}.{t}" for t in choose(i, types, k)}
    return Selection(candidates, frozenset(selected), ratio, gates)


# ---------------------------------------------------------------------------- JSON


def _nest(candidates: Candidates, value: Callable) -> dict:
    """Layer -> module type -> value."""
    table: dict[str, dict] = {layer: {} for layer in candidates.layers}
    for name, (i, j) in candidates.places.items():
        table[candidates.layers[i]][candidates.types[j]] = value(name, i, j)
    return table


def _parse(data: object, form: str, kinds: tuple[type, ...]) -> tuple[Candidates, list[dict]]:
    """The candidates of a table, and its rows; ArgumentError where it is none."""
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
