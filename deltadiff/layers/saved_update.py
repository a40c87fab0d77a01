"""`SavedUpdate`: the numbers and past updates of a `PendingDelta` as tensors of a state.

update             lambda and s of the last step, whether W holds the update, the number of past
                   updates (-1: not known as factors), the sum of 2^i for each of these that W
                   holds, and the rank of each; float64
past_A, past_B     the factors of all past updates, one after the other

The states of models and of optimizers have the same three, beside the anchors. Older ones, which
`read_update` reads too, have the factors of each past update by themselves (past_A.0, past_B.0,
...), and then no ranks. The oldest states of models have "numbers" in the place of "update", with
one number for each past update that says whether W holds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..errors import ArgumentError
from .low_rank_factors import LowRankFactors

MOST = 50  # past updates whose places fit a float64
Refuse = Callable[[object, str], ArgumentError]


@dataclass
class SavedUpdate:
    """What a state says of the update of one layer, beside the anchors.

    Attributes:
        update_ratio, scaling: lambda and s of the last step.
        in_weight: whether W holds the update, or the forward pass adds it.
        past_updates: see `PendingDelta`.
    """

    update_ratio: float
    scaling: float
    in_weight: bool
    past_updates: list[LowRankFactors] | None

    def to(self, device: torch.device) -> "SavedUpdate":
        """Move the past updates, in place."""
        for p in self.past_updates or ():
            p.A, p.B = p.A.to(device), p.B.to(device)
        return self


def write_update(saved: SavedUpdate, anchor_A: Tensor, anchor_B: Tensor) -> dict[str, Tensor]:
    """The entries "update", "past_A" and "past_B", on the device of the anchors.

    Each is there always, because torch.distributed gives other processes what they have, too.
    """
    past, a = saved.past_updates or [], anchor_A
    count, wide = -1 if saved.past_updates is None else len(past), wide_dtype(a.dtype)
    places = sum(2**i for i, p in enumerate(past) if p.in_weight)
    numbers = [saved.update_ratio, saved.scaling, saved.in_weight, count, places]
    numbers += [p.A.shape[0] for p in past]
    none_A = torch.empty(0, a.shape[1], dtype=wide, device=a.device)
    none_B = torch.empty(anchor_B.shape[0], 0, dtype=wide, device=a.device)
    return {
        "update": torch.tensor(numbers, dtype=torch.float64, device=a.device),
        "past_A": torch.cat([none_A, *(p.A for p in past)]),
        "past_B": torch.cat([none_B, *(p.B for p in past)], dim=1),
    }


def read_update(where: str, entry: dict[str, Any], sizes: tuple[int, int]) -> SavedUpdate | None:
    """What `write_update` wrote, removed from ``entry``; None for a state from before any step.

    Args:
        where: what an error names.
        sizes: (out_features, in_features) of the layer.

    Raises:
        ArgumentError: a number or tensor that is missing, or that does not fit the layer.
    """

    def refuse(given: object, accepted: str) -> ArgumentError:
        return ArgumentError(where, given, accepted)

    past: dict[str, Any] = {
        key: entry.pop(key) for key in list(entry) if str(key).startswith("past_")
    }
    found = {key: entry.pop(key) for key in ("update", "numbers") if key in entry}
    if not found:
        if past:
            raise refuse(f"{len(past)} factors alone", "its numbers, too")
        return None
    tensor: Any
    ((kind, tensor),) = found.items() if len(found) == 1 else (("both", None),)
    fits = isinstance(tensor, Tensor) and tensor.dim() == 1 and not tensor.is_meta
    fits = fits and tensor.layout == torch.strided and not tensor.is_complex()
    if not fits or len(tensor) < (4 if kind == "numbers" else 5):
        raise refuse(f"{kind}: {type(tensor).__name__}", "a tensor of 5 numbers or more")
    numbers: list[float] = tensor.double().tolist()
    if kind == "numbers":
        numbers = _of_oldest(numbers, refuse)
    ratio, scaling, in_weight, count, places, *ranks = numbers
    fine = 0 <= ratio < float("inf") and abs(scaling) < float("inf") and in_weight in (0, 1)
    fine = fine and count in range(-1, MOST + 1) and places in range(2 ** max(0, int(count)))
    if not fine:
        raise refuse([ratio, scaling, in_weight, count, places], "lambda, s, 0 or 1, and counts")
    if "past_A" in past or ranks:
        past = _split_factors(past, ranks, refuse)
    kept = []
    for i in range(int(count)):
        b: Any = past.pop(f"past_B.{i}", None)
        a: Any = past.pop(f"past_A.{i}", None)
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else None for t in (b, a)]
        rank = shapes[1][0] if shapes[1] else 0
        wanted = [(sizes[0], rank), (rank, sizes[1])]
        if shapes != wanted or not all(t.is_floating_point() and not t.is_meta for t in (b, a)):
            raise refuse(f"past update {i} of shapes {shapes}", f"{wanted}")
        kept.append(LowRankFactors(b, a, bool(int(places) >> i & 1)))
    if past:
        raise refuse(f"also {sorted(map(str, past))[:4]}", f"{int(count)} past updates")
    return SavedUpdate(ratio, scaling, bool(in_weight), None if count < 0 else kept)


def _of_oldest(numbers: list[float], refuse: Refuse) -> list[float]:
    """The numbers as "update" has them."""
    *head, count = numbers[:4]
    written = numbers[4:]
    if len(written) != max(0, count) or any(w not in (0, 1) for w in written):
        raise refuse(f"numbers {numbers[3:]}", "the number of past updates, and 0 or 1 for each")
    return [*head, count, sum(2**i for i, w in enumerate(written) if w)]


def _split_factors(past: dict[str, Any], ranks: list[float], refuse: Refuse) -> dict[str, Tensor]:
    """The factors of each past update by the names that older states gave them."""
    a, b = past.get("past_A"), past.get("past_B")
    fits = past.keys() == {"past_A", "past_B"} and all(n in range(1, 2**31) for n in ranks)
    fits = fits and isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() == b.dim() == 2
    sizes = [int(n) for n in ranks] if fits else []
    if not fits or a is None or b is None or not a.shape[0] == b.shape[1] == sum(sizes):
        raise refuse(
            f"past updates of ranks {ranks} in {sorted(past)}", "past_A and past_B of these"
        )
    names = [f"past_{factor}.{i}" for factor in "AB" for i in range(len(sizes))]
    return dict(zip(names, (*a.split(sizes), *b.split(sizes, dim=1)), strict=True))
