"""The updates of W in states of `DeltaLoRA` that have no format yet."""

from ..errors import ArgumentError
from ..layers.low_rank_factors import LowRankFactors
from ..layers.saved_update import SavedUpdate, write_update
from .saved_state import SavedState, saved_int


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
                run = SavedUpdate(float(ratio), update.scaling_of(layer), update.inplace, kept)
                entry |= write_update(run, layer.lora_A, layer.lora_B)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ArgumentError):
            raise
        given = f"an older state that is garbled ({type(error).__name__}: {error})"
        raise ArgumentError("state_dict", given, "what an older version wrote") from error
