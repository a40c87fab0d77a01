"""The update of Delta-LoRA in the state of a model: written, loaded, and moved with its layer.

A `PendingDelta` is an attribute of its layer, no buffer: buffers would leak into the files of PEFT
and make older states incomplete. The layer writes it into its state and takes it out again; a state
without it means that there is none.
"""

import torch
from torch import Tensor

from ..errors import SwapError
from .lora_layers import LoraLayer
from .pending_delta import LowRankFactors, PendingDelta


def delta_to_state(delta: PendingDelta, prefix: str) -> dict[str, Tensor]:
    """The tensors that `take_saved_delta` reads, by name; none shares memory with another.

    ``numbers`` holds lambda, the scaling, whether W holds the update, the number of past updates
    (-1: too many to keep), and for each of these whether W holds it.
    """
    past = delta.past_updates
    count = -1 if past is None else len(past)
    numbers = [delta.update_ratio, delta.scaling, delta.in_weight, count]
    numbers += [p.in_weight for p in past or ()]
    state = {
        "anchor_A": delta.anchor_A, "anchor_B": delta.anchor_B,
        "rank_scale": delta.rank_scale.clone(),
        "numbers": torch.tensor(numbers, dtype=torch.float64),
    }  # fmt: skip
    for i, p in enumerate(past or ()):
        state |= {f"past_A.{i}": p.A, f"past_B.{i}": p.B}
    return {f"{prefix}{name}": t for name, t in state.items()}


def take_saved_delta(state: dict[str, Tensor], prefix: str) -> PendingDelta | None:
    """The delta that `delta_to_state` wrote, removed from ``state``; None for none."""
    found = {n.removeprefix(prefix): state.pop(n) for n in list(state) if n.startswith(prefix)}
    if not found:
        return None
    ratio, scaling, in_weight, count, *past_in_weight = found["numbers"].tolist()
    past = [
        LowRankFactors(found[f"past_B.{i}"], found[f"past_A.{i}"], bool(written))
        for i, written in enumerate(past_in_weight)
    ]
    return PendingDelta(
        found["anchor_A"].clone(), found["anchor_B"].clone(), ratio, scaling,
        found["rank_scale"].clone(), bool(in_weight), past_updates=None if count < 0 else past,
    )  # fmt: skip


@torch.no_grad()
def load_delta(
    layer: LoraLayer, saved: PendingDelta | None, lora_A: Tensor, lora_B: Tensor
) -> None:
    """Make the update of a layer the saved one; None: there is none.

    A delta that is there is changed in place, because an optimizer may hold its tensors. What was
    saved under another lambda or scaling, or before this run started, becomes a past update.

    Args:
        lora_A, lora_B: the pair as it was saved.

    Raises:
        SwapError: the forward pass added the saved update, and this layer's is written into W.
    """
    own = layer.delta
    if own is None:
        layer.delta = saved
        if saved is not None:
            follow_module(saved, layer.lora_A)
        return
    check_loadable(own, saved)
    same = saved is not None and saved.started() == own.started()
    if saved is not None and same and (saved.factor() == own.factor() or not own.started()):
        anchors, own.past_updates = (saved.anchor_A, saved.anchor_B), saved.past_updates
    else:
        anchors, own.past_updates = (lora_A, lora_B), [] if saved is None else saved.past_updates
        if saved is not None and saved.started() and own.past_updates is not None:
            own.past_updates.append(saved.product(lora_A, lora_B))
    own.anchor_A.copy_(anchors[0])
    own.anchor_B.copy_(anchors[1])
    follow_module(own, layer.lora_A)


def check_loadable(own: PendingDelta | None, saved: PendingDelta | None) -> None:
    """Raise SwapError where `load_delta` could not make the update of a layer the saved one."""
    if own is None or saved is None or not own.in_weight or saved.in_weight:
        return
    if saved.changes_model():
        given = "the state of a factored run, while the optimizer of this model writes into W"
        raise SwapError("state_dict", given, "DeltaLoRA(w_update='factored'), or no optimizer yet")


def follow_module(delta: PendingDelta, lora_A: Tensor) -> None:
    """Move the tensors of a delta to the device of the pair; the anchors get its dtype too.

    Their identity stays, because an optimizer may hold them.
    """
    device = lora_A.device
    for anchor in (delta.anchor_A, delta.anchor_B):
        if anchor.device != device or anchor.dtype != lora_A.dtype:
            anchor.data = anchor.data.to(device, lora_A.dtype)
    delta.rank_scale = delta.rank_scale.to(device)
    if delta.remainder is not None and delta.remainder.device != device:
        delta.remainder.data = delta.remainder.data.to(device)
    for p in delta.past_updates or ():
        p.A, p.B = p.A.to(device), p.B.to(device)
