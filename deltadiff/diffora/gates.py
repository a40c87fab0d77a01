"""`GateMatrix` and `Selection`: the gates that stage 1 finds, and the choice made by them.

Both are plain data: a number, or a yes or no, for each of the `Candidates`, without tensors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_number
from ..errors import ArgumentError
from .candidates import Candidates
from .json_table import VERSION, JsonFile, nest_by_layer, parse_table

Choose = Callable[[int, tuple[str, ...], int], list[str]]
Rows = list[list[float | None]]  # the values of a `GateMatrix` while they are filled in


@dataclass(frozen=True)
class GateMatrix(JsonFile):
    """The relaxed matrix of gates (DiffoRA eq. 11), a row for each layer.

    Attributes:
        candidates: which layers and modules.
        values: for each layer, the gate of each module type, in [0, 1]; None where the layer has
            no such module.
    """

    FORMAT = "deltadiff-gates"

    candidates: Candidates
    values: tuple[tuple[float | None, ...], ...]

    @classmethod
    def from_tensor(cls, candidates: Candidates, values: Tensor) -> "GateMatrix":
        """The gates in a (layers, types) tensor; its entries without a module are ignored."""
        table: Rows = [[None] * len(candidates.types) for _ in candidates.layers]
        numbers = values.detach().tolist()
        for i, j in candidates.places.values():
            table[i][j] = numbers[i][j]
        return cls(candidates, tuple(map(tuple, table)))

    def __post_init__(self) -> None:
        shape = (len(self.candidates.types),) * len(self.candidates.layers)
        if tuple(map(len, self.values)) != shape:
            given = f"rows of {', '.join(str(len(row)) for row in self.values)}"
            raise ArgumentError("values", given, f"{len(shape)} rows of {shape[0]}")
        for name, (i, j) in self.candidates.places.items():
            value = self.values[i][j]
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ArgumentError(f"gate of {name}", value, "a number from 0 to 1")

    def discretise(self, ratio: float) -> "Selection":
        """Select the modules with the K = floor(ratio N) largest gates of each layer (eq. 14).

        It selects exactly K modules: of equal gates, that of the earlier module in the layer counts
        as larger.

        Args:
            ratio: rho, in (0, 1], with ratio N >= 1 for the N modules of every layer. A product
                that differs from a whole number by rounding only (0.7 * 10, 2/3 * 6) counts as
                that number.

        Raises:
            ArgumentTypeError, ArgumentError: the ratio is outside of these limits.
        """

        def largest(i: int, types: tuple[str, ...], k: int) -> list[str]:
            row = zip(self.candidates.types, self.values[i], strict=True)
            gates = {t: value for t, value in row if value is not None}
            return sorted(types, key=lambda t: -gates[t])[:k]  # a stable sort

        return _select(self.candidates, ratio, largest, self)

    def to_json(self) -> dict:
        """The plain data of the JSON file."""
        table = nest_by_layer(self.candidates, lambda _, i, j: self.values[i][j])
        return {"format": self.FORMAT, "version": VERSION, "layers": table}

    @classmethod
    def from_json(cls, data: object) -> "GateMatrix":
        """Parse what `to_json` gave; ArgumentError where something else is in the data."""
        candidates, table = parse_table(data, cls.FORMAT, (int, float))
        column = {t: j for j, t in enumerate(candidates.types)}
        rows: Rows = [[None] * len(column) for _ in candidates.layers]
        for row, gates in zip(rows, table, strict=True):
            for t, value in gates.items():
                row[column[t]] = float(value) if abs(value) <= 1 else value  # refused below
        return cls(candidates, tuple(map(tuple, rows)))


@dataclass(frozen=True)
class Selection(JsonFile):
    """Which candidates get a low-rank pair of their own in stage 2.

    Attributes:
        candidates: the modules that the choice was made among.
        selected: full names of the modules that were chosen.
        ratio: rho, the share of each layer's modules that was asked for.
        gates: the gates that the choice was made by; None for a random choice.
    """

    FORMAT = "deltadiff-selection"

    candidates: Candidates
    selected: frozenset[str]
    ratio: float
    gates: GateMatrix | None = None

    def __post_init__(self) -> None:
        unknown = sorted(self.selected - set(self.candidates.places))
        if unknown:
            raise ArgumentError("selected", unknown[0], "names of candidates")

    @property
    def others(self) -> tuple[str, ...]:
        """The candidates that were not selected."""
        return tuple(name for name in self.candidates.places if name not in self.selected)

    def to_json(self) -> dict:
        """The plain data of the JSON file, also of the adapter file of a model swapped so."""
        table = nest_by_layer(self.candidates, lambda name, i, j: name in self.selected)
        return {
            "format": self.FORMAT,
            "version": VERSION,
            "ratio": self.ratio,
            "layers": table,
            "gates": None if self.gates is None else self.gates.to_json(),
        }

    @classmethod
    def from_json(cls, data: object) -> "Selection":
        """Parse what `to_json` gave; ArgumentError where something else is in the data."""
        candidates, table = parse_table(data, cls.FORMAT, (bool,))
        assert isinstance(data, dict)  # `parse_table` accepts nothing else
        pairs = zip(candidates.layers, table, strict=True)
        selected = {f"{layer}.{t}" for layer, row in pairs for t, chosen in row.items() if chosen}
        gates = None if data.get("gates") is None else GateMatrix.from_json(data["gates"])
        ratio = _check_ratio(data.get("ratio"))
        return cls(candidates, frozenset(selected), ratio, gates)


def random_selection(candidates: Candidates, ratio: float, seed: int = 0) -> Selection:
    """Select K modules of each layer at random: the control experiment of DiffoRA's table 3.

    Args:
        candidates: the modules to choose among.
        ratio: rho; K = floor(ratio N), as in `GateMatrix.discretise`.
        seed: fixes the choice.

    Raises:
        ArgumentTypeError, ArgumentError: a ratio that `GateMatrix.discretise` refuses.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(i: int, types: tuple[str, ...], k: int) -> list[str]:
        return [types[j] for j in torch.randperm(len(types), generator=generator)[:k]]

    return _select(candidates, ratio, some, None)


def _check_ratio(ratio: object) -> float:
    share = check_number("ratio", ratio)
    if not 0 < share <= 1:
        raise ArgumentError("ratio", ratio, "a share in (0, 1]")
    return share


def _select(
    candidates: Candidates, ratio: float, choose: Choose, gates: GateMatrix | None
) -> Selection:
    """The selection of the modules that ``choose(layer index, types, K)`` names in each layer."""
    ratio, selected = _check_ratio(ratio), set()
    for i, (layer, types) in enumerate(zip(candidates.layers, candidates.modules, strict=True)):
        # 1e-9 is far above the rounding of a product, and far below the step between two shares.
        k = math.floor(ratio * len(types) + 1e-9)
        if k < 1:
            given = f"{ratio} of {len(types)} modules in {layer}, which is less than one"
            raise ArgumentError("ratio", given, f"{1 / len(types):.3g} to 1")
        selected |= {f"{layer}.{t}" for t in choose(i, types, k)}
    return Selection(candidates, frozenset(selected), ratio, gates)
