"""`SavedUpdate`: the update of one layer's W in the state of `DeltaLoRA`, beside lora_B's moments.

anchor, last       of each factor, see `PendingDelta`
remainder          of a 16-bit W, where it is updated in place; see `saved_remainder`
weight             W, where it is updated in place; a reference, not a copy
update             lambda and s of the last step, whether W holds the update, the number of past
                   updates (-1: too many to keep), the sum of 2^i for each of these that W holds,
                   and the rank of each; missing before the first step
past_A, past_B     the factors of all past updates, one after the other
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..layers.pending_delta import LowRankFactors
from .saved_state import SavedState, saved_int

MOST = 50  # past updates whose places fit a float64


@dataclass
class SavedUpdate:
    """What a state says of the update of one layer.

    Attributes:
        update_ratio, scaling: lambda and s of the last step.
        past_updates: see `PendingDelta`; their tensors are on the layer's device.
    """

    update_ratio: float
    scaling: float
    past_updates: list[LowRankFactors] | None


def write_update(saved: SavedUpdate, in_weight: bool, layer: LoraLayer) -> dict[str, Tensor]:
    """The entries "update", "past_A", "past_B" of a layer, on its device.

    Each is there always, because torch.distributed gives other processes what they have, too.

    ``in_weight``: whether W holds the update.
    """
    past, a = saved.past_updates or [], layer.lora_A
    count, wide = -1 if saved.past_updates is None else len(past), wide_dtype(a.dtype)
    places = sum(2**i for i, p in enumerate(past) if p.in_weight)
    numbers = [saved.update_ratio, saved.scaling, in_weight, count, places]
    numbers += [p.A.shape[0] for p in past]
    none_A = torch.empty(0, layer.in_features, dtype=wide, device=a.device)
    none_B = torch.empty(layer.out_features, 0, dtype=wide, device=a.device)
    return {
        "update": torch.tensor(numbers, dtype=torch.float64, device=a.device),
        "past_A": torch.cat([none_A, *(p.A for p in past)]),
        "past_B": torch.cat([none_B, *(p.B for p in past)], dim=1),
    }


def take_weight(name: str, entry: dict[str, Any], layer: LoraLayer) -> Tensor:
    """W, removed from ``entry``; raises where it is missing or does not fit the layer's."""
    saved, w = entry.pop("weight", None), layer.weight
    if not isinstance(saved, Tensor):
        form = "none" if saved is None else type(saved).__name__
    elif (saved.shape, saved.dtype, saved.is_meta) == (w.shape, w.dtype, w.is_meta):
        return saved
    else:
        form = f"{tuple(saved.shape)} of {saved.dtype}"
    accepted = f"{tuple(w.shape)} of {w.dtype}, as in this model"
    raise ArgumentError(f"weight of {name} in state_dict", form, accepted)


def read_update(
    name: str, entry: dict[str, Any], layer: LoraLayer, inplace: bool
) -> SavedUpdate | None:
    """What `write_update` wrote, removed from ``entry``; None for a state from before any step.

    Raises:
        ArgumentError: a number or tensor that is missing, or that does not fit the layer.
    """

    def refuse(given: object, accepted: str) -> ArgumentError:
        return ArgumentError(f"update of {name} in state_dict", given, accepted)

    numbers = entry.pop("update", None)
    past: dict[str, Any] = {
        key: entry.pop(key) for key in list(entry) if str(key).startswith("past_")
    }
    if numbers is None:
        if past:
            raise refuse(f"{len(past)} factors alone", "its numbers, too")
        return None
    if not isinstance(numbers, Tensor) or numbers.dim() != 1 or numbers.is_meta or len(numbers) < 5:
        raise refuse(type(numbers).__name__, "a tensor of 5 numbers or more")
    ratio, scaling, in_weight, count, places, *ranks = numbers.double().tolist()
    fine = 0 <= ratio < float("inf") and abs(scaling) < float("inf")
    fine = fine and count in range(-1, MOST + 1) and places in range(2 ** max(0, int(count)))
    if not fine or in_weight != inplace:
        raise refuse([ratio, scaling, in_weight, count, places], "those of such an optimizer")
    if "past_A" in past or ranks:
        past = _split_factors(past, ranks, refuse)
    kept = []
    for i in range(int(count)):
        b: Any = past.pop(f"past_B.{i}", None)
        a: Any = past.pop(f"past_A.{i}", None)
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else None for t in (b, a)]
        rank = shapes[1][0] if shapes[1] else 0
        wanted = [(layer.out_features, rank), (rank, layer.in_features)]
        if shapes != wanted or not all(t.is_floating_point() and not t.is_meta for t in (b, a)):
            raise refuse(f"past update {i} of shapes {shapes}", f"{wanted}")
        device = layer.lora_A.device
        kept.append(LowRankFactors(b.to(device), a.to(device), bool(int(places) >> i & 1)))
    if past:
        raise refuse(f"also {sorted(map(str, past))[:4]}", f"{int(count)} past updates")
    return SavedUpdate(ratio, scaling, None if count < 0 else kept)


def _split_factors(
    past: dict[str, Any], ranks: list[float], refuse: Callable[[object, str], ArgumentError]
) -> dict[str, Tensor]:
    """The factors of each past update by the names that format 2 gave them."""
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


def add_older_updates(saved: SavedState, updates: list, w_update: str | None) -> None:
    """Put what an older state has under "delta_lora" where this version has it.

    Args:
        updates: the optimizer's `WeightUpdate`s.
        w_update: the optimizer's.

    Raises:
        ArgumentError: there is no such entry, it is garbled, or it is of another ``w_update``.
    """
    extra = saved.older.get("delta_lora")
    if extra is None:
        raise ArgumentError(
            "state_dict", "no Delta-LoRA state", f"a state of w_update={w_update!r}"
        )
    try:
        saved.run |= {"w_update": extra["w_update"]}
        saved.run["iteration"] = saved_int("iteration", extra["iteration"], 0)
        if len(extra["update_ratio"]) != len(updates):
            given = f"{len(extra['update_ratio'])} update ratios"
            raise ArgumentError("state_dict", given, str(len(updates)))
        foreign = sorted(set(extra["folded"]) - set(saved.ids))
        if foreign:
            raise ArgumentError("state_dict", f"past updates of {foreign}", "those of its groups")
        number = {p: i for i, p in saved.ids.items()}
        for update, ratio in zip(updates, extra["update_ratio"], strict=True):
            for layer in update.layers.values():
                i, entry = number[layer.lora_B], saved.entries[layer.lora_B]
                weights = extra.get("weights", {})
                entry |= {"weight": weights[i]} if i in weights else {}
                if i not in extra["folded"]:
                    continue
                past = extra["folded"][i]
                kept = past if past is None else [LowRankFactors(b, a, bool(w)) for b, a, w in past]
                run = SavedUpdate(float(ratio), update.scaling_of(layer), kept)
                entry |= write_update(run, update.inplace, layer)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        given = f"an older state that is garbled ({type(error).__name__}: {error})"
        raise ArgumentError("state_dict", given, "what an older version wrote") from error
