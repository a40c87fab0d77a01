"""What the update of W keeps in the state of an optimizer: anchors, copies and remainders.

Each is allocated once, and follows a parameter or weight that was moved to another device or dtype.
Its identity stays, because a layer's `PendingDelta` holds it too.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import REMAINDER_DTYPES
from ..layers.lora_layers import LoraLayer
from ..ranks import is_partitioned, local, whole_shape


def allocate_factor(p: Tensor, state: dict[str, Any], deltas: dict[Tensor, Tensor] | None) -> None:
    """Give lora_A or lora_B its "anchor" and "last"; in ``deltas``, if given, its p' - p."""
    like = p.new_zeros(whole_shape(p)) if is_partitioned(p) else p.detach()
    state.setdefault("anchor", torch.zeros_like(like))
    state.setdefault("last", like.clone())
    for own in (state["anchor"], state["last"]):
        if own.device != p.device or own.dtype != p.dtype:  # no `PendingDelta` moved it
            own.data = own.data.to(p.device, p.dtype)
    if deltas is None:
        return
    like, delta = state["exp_avg"], deltas.get(p)
    if delta is None or delta.device != like.device or delta.dtype != like.dtype:
        deltas[p] = torch.zeros_like(local(like))


def allocate_remainder(layer: LoraLayer, state: dict[str, Any], keeps: bool) -> None:
    """Give lora_B the remainder of its layer's W, where this ``keeps`` one."""
    if not keeps:
        state.pop("remainder", None)
        return
    w, low, delta = layer.matrix, state.get("remainder"), layer.delta
    if delta is not None and delta.anchor_B is state.get("anchor"):
        low = state["remainder"] = delta.remainder  # it has followed W, see `follow_weight`
    dtype = REMAINDER_DTYPES[w.dtype]
    if low is None or low.dtype != dtype:
        state["remainder"] = torch.zeros_like(w.detach(), dtype=dtype)  # W's strides too
    elif low.device != w.device:
        low.data = low.data.to(w.device)
