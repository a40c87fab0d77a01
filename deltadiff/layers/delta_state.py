"""The update of Delta-LoRA in the state of a model: written, loaded, and moved with its layer.

A `PendingDelta` is an attribute of its layer, no buffer: buffers would leak into the files of PEFT
and make older states incomplete. The layer writes it into its state and takes it out again; a state
without it means that there is none.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ..checks import HALF_DTYPES, wide_dtype
from ..errors import ArgumentError, SwapError
from ..ops.reference import join_remainder, split_remainder
from ..ranks import (
    copy_values,
    is_partitioned,
    is_sharded,
    like_shards,
    local,
    of_the_first,
    shard_like,
)
from .lora_layers import LoraLayer
from .pending_delta import PendingDelta
from .saved_update import SavedUpdate, read_update


class LostUpdateWarning(UserWarning):
    """Delta-LoRA's update is missing from a file or was dropped from a model."""


def delta_to_state(
    delta: PendingDelta, prefix: str, lora_A: Tensor, lora_B: Tensor
) -> dict[str, Tensor]:
    """The tensors that `take_saved_delta` reads, by name; none shares memory with another.

    Each name leads from the layer's attribute to its tensor, because torch.distributed's
    checkpoints walk all names of a state. ``last_A`` and ``last_B`` are there where the pair is
    another than the last step left; reads from the device.

    There are none of a sharded layer whose update is an optimizer's. A state of sharded tensors is
    loaded into what the model has already, which is no update in a new run; the optimizer's state
    then brings it back. A warning says so where the model needs it and W does not hold it. Of a
    layer that ZeRO-3 has partitioned a state has no values, of the pair as of the update.
    """
    if (is_sharded(lora_A) or is_partitioned(lora_A)) and delta.unseen:
        if not lora_A.is_meta and not delta.in_weight and delta.changes_model():
            warnings.warn(
                "the state of a sharded model leaves out the factored update of Delta-LoRA, which "
                "the optimizer's state holds; `save_adapter` or `export_peft` write it for others",
                LostUpdateWarning, stacklevel=3,
            )  # fmt: skip
        return {}
    state = {
        "anchor_A": delta.anchor_A, "anchor_B": delta.anchor_B,
        "rank_scale": delta.rank_scale.clone(), **delta.written(),
    }  # fmt: skip
    if delta.differs(lora_A, lora_B):
        state |= {"last_A": delta.last_A, "last_B": delta.last_B}
    return {f"{prefix}{name}": t for name, t in state.items()}


def check_saved_delta(
    state: dict[str, Any],
    prefix: str,
    layer: LoraLayer,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> None:
    """Raise where `take_saved_delta` or `load_delta` would; nothing is changed or sent."""
    found = _entries(state, prefix)
    if found and lora_A is not None and is_sharded(lora_A):
        _parse(found, prefix, layer)
    elif found:
        own = {f"{prefix}{name}": value for name, value in found.items()}
        check_loadable(layer.delta, take_saved_delta(own, prefix, layer, lora_A, lora_B))


def take_saved_delta(
    state: dict[str, Any],
    prefix: str,
    layer: LoraLayer,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
) -> PendingDelta | None:
    """The delta that `delta_to_state` wrote, removed from ``state``; None for none.

    ``lora_A``, ``lora_B``: the pair as it was saved; None in a part of a state. Where they are
    sharded, all processes call this.

    Raises:
        ArgumentError: a part is missing, unknown, or does not fit the layer.
    """
    found = _entries(state, prefix)
    for name in found:
        del state[prefix + name]
    if lora_A is not None and is_sharded(lora_A):
        found = of_the_first(found, lora_A)
    if not found:
        return None
    saved, factors, rank_scale = _parse(found, prefix, layer)
    anchors = factors["anchor_A"], factors["anchor_B"]
    pair = [anchor if p is None else p for p, anchor in zip((lora_A, lora_B), anchors, strict=True)]
    last = factors.get("last_A", pair[0]), factors.get("last_B", pair[1])
    anchor_A, anchor_B, last_A, last_B = (
        like_shards(t.detach().clone(), p) for t, p in zip((*anchors, *last), pair * 2, strict=True)
    )
    return PendingDelta(
        anchor_A, anchor_B, last_A, last_B, saved.update_ratio, saved.scaling, rank_scale,
        saved.in_weight, past_updates=saved.past_updates,
    )  # fmt: skip


def _entries(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What a state has under a prefix, by the names without it."""
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def _parse(
    found: dict[str, Any], prefix: str, layer: LoraLayer
) -> tuple[SavedUpdate, dict[str, Tensor], Tensor]:
    """The numbers of a delta, its factors and its rank_scale; raises where they do not fit."""
    left, r, n, k = dict(found), layer.r, layer.out_features, layer.in_features
    saved = read_update(f"{prefix}update in state_dict", left, (n, k))
    shapes = {"A": (r, k), "B": (n, r)}
    wanted = {f"anchor_{x}": shape for x, shape in shapes.items()} | {"rank_scale": (2 * r,)}
    if any(name.startswith("last_") for name in left):
        wanted |= {f"last_{x}": shape for x, shape in shapes.items()}
    if saved is None or left.keys() != wanted.keys():
        given = f"{', '.join(sorted(map(str, found)))[:200] or 'nothing'}"
        raise ArgumentError(f"{prefix}* in state_dict", given, ", ".join(["update", *wanted]))
    for name, shape in wanted.items():
        t = left[name]
        fits = isinstance(t, Tensor) and t.is_floating_point() and tuple(t.shape) == shape
        if not fits or t.layout != torch.strided:
            form = f"{tuple(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            accepted = f"a tensor of {shape}, as this layer has rank {r}"
            raise ArgumentError(f"{prefix}{name} in state_dict", form, accepted)
    rank_scale = left.pop("rank_scale").clone()
    scales = [
        PendingDelta.make_rank_scale(saved.update_ratio, r, rank_scale, started).to(rank_scale)
        for started in (False, True)
    ]
    if not rank_scale.is_meta and not any(torch.allclose(rank_scale, s) for s in scales):
        accepted = f"1 + lambda and -lambda, or 1 and 0, for lambda = {saved.update_ratio}"
        raise ArgumentError(f"{prefix}rank_scale in state_dict", "other numbers", accepted)
    return saved, left, rank_scale


@torch.no_grad()
def load_delta(
    layer: LoraLayer, saved: PendingDelta | None, lora_A: Tensor, lora_B: Tensor
) -> None:
    """Make the update of a layer the saved one; None: there is none.

    A delta that is there is changed in place, because an optimizer may hold its tensors. What was
    saved under another lambda or scaling, or before this run started, becomes a past update. A
    delta that goes on from the very pair that was loaded stays where the state has none: the state
    is of the same run, and the optimizer's brought the delta back already.

    Args:
        lora_A, lora_B: the pair as it was saved.

    Raises:
        SwapError: the forward pass added the saved update, and this layer's is written into W.
    """
    own = layer.delta
    if saved is None and is_partitioned(layer.lora_A):
        return  # ZeRO-3's optimizer restores the pair, and so the update
    if own is None:
        layer.delta = saved
        if saved is not None:
            follow_module(saved, layer.lora_A, layer.lora_B)
        return
    check_loadable(own, saved)
    if saved is None and not own.differs(lora_A, lora_B):
        return
    same = saved is not None and saved.started() == own.started()
    if saved is not None and same and (saved.factor() == own.factor() or not own.started()):
        anchors, own.past_updates = (saved.anchor_A, saved.anchor_B), saved.past_updates
        last = saved.last_A, saved.last_B
    else:
        anchors = last = lora_A, lora_B
        own.past_updates = [] if saved is None else saved.past_updates
        if saved is not None and saved.started() and own.past_updates is not None:
            own.past_updates.append(saved.product())
    copy_values(own.anchor_A, anchors[0])
    copy_values(own.anchor_B, anchors[1])
    own.set_last(*last)
    for flag in own.unseen:
        flag.zero_()
    follow_module(own, layer.lora_A, layer.lora_B)


def check_loadable(own: PendingDelta | None, saved: PendingDelta | None) -> None:
    """Raise SwapError where `load_delta` could not make the update of a layer the saved one."""
    if own is None or saved is None or not own.in_weight or saved.in_weight:
        return
    if saved.changes_model():
        given = "the state of a factored run, while the optimizer of this model writes into W"
        raise SwapError("state_dict", given, "DeltaLoRA(w_update='factored'), or no optimizer yet")


@torch.no_grad()
def follow_module(delta: PendingDelta, lora_A: Tensor, lora_B: Tensor) -> None:
    """Move the tensors of a delta to the device of the pair; anchors and copies get its dtype too.

    Their identity stays, because an optimizer may hold them. The update stays what it was: where
    the dtype cannot hold the factors, it becomes a past one, and the rounded pair goes on.

    Raises:
        SwapError: see `stays_behind`.
    """
    if stays_behind(delta, lora_A):
        return
    delta.settle()
    device, dtype = lora_A.device, lora_A.dtype
    factors = delta.anchor_A, delta.anchor_B, delta.last_A, delta.last_B
    rounds = any(not _fits(t, dtype) for t in factors) and delta.started()
    pending = delta.product() if rounds else None
    for t in factors:
        if t.device != device or t.dtype != dtype:
            t.data = t.data.to(device, dtype)
    if pending is not None and delta.past_updates is not None:
        delta.past_updates.append(pending)
        delta.anchor_A.copy_(lora_A)
        delta.anchor_B.copy_(lora_B)
        delta.take_pair(lora_A, lora_B)
    delta.rank_scale = delta.rank_scale.to(device, wide_dtype(dtype))
    if delta.remainder is not None and delta.remainder.device != device:
        delta.remainder.data = delta.remainder.data.to(device)
    for p in delta.past_updates or ():
        p.A, p.B = p.A.to(device), p.B.to(device)


@torch.no_grad()
def follow_loading(delta: PendingDelta, before: Tensor, matrix: Tensor) -> None:
    """Keep the remainder, which belongs to the bits of W that were there, where they stayed.

    ``before``, ``matrix``: W before and after it was loaded. What was sharded or came back from
    meta in between was not trained yet, and has no remainder.
    """
    low = delta.remainder
    if low is None or before.is_meta or is_sharded(low) != is_sharded(matrix):
        return
    low.mul_(before == matrix)


@torch.no_grad()
def follow_weight(delta: PendingDelta, before: Tensor, matrix: Tensor) -> None:
    """Let the remainder follow a W that was converted to another dtype.

    What it held goes into the new W. What a 16-bit W cannot hold of an update stays in a remainder,
    which is a new tensor if W was wider till now; an optimizer takes it over when it is built anew.

    ``before``, ``matrix``: W as it was, and as it is now.
    """
    low = delta.remainder
    if before.dtype == matrix.dtype or before.is_meta or matrix.is_meta:
        return
    narrows = before.dtype not in HALF_DTYPES and matrix.dtype in HALF_DTYPES
    if low is None and not (narrows and delta.in_weight and delta.changes_model()):
        return
    w, target = local(before), local(matrix)
    wide = w.float() if low is None else join_remainder(w, local(low).to(w.device))
    wide, delta.remainder, delta.remainder_of = wide.to(target.device), None, matrix.dtype
    if matrix.dtype in HALF_DTYPES:
        wide, rest = split_remainder(wide, matrix.dtype)
        delta.remainder = shard_like(rest, matrix)
    target.copy_(wide)


def stays_behind(delta: PendingDelta, lora_A: Tensor) -> bool:
    """Whether the pair is on meta, where a delta that has not begun waits for it to come back.

    Accelerate may shard a model there (FSDP's ``cpu_ram_efficient_loading``). It then gives the
    parameters their values again, and nothing else that belonged to the state of the model.

    Raises:
        SwapError: the update is a part of the model, and would be lost.
    """
    if not lora_A.is_meta or delta.last_A.is_meta:
        return False
    if delta.changes_model():
        given = "meta, where the update of Delta-LoRA that this model holds would be lost"
        accepted = "FSDP's cpu_ram_efficient_loading=False, or to load the update after sharding"
        raise SwapError("device", given, accepted)
    return True


def _fits(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds the values of a tensor."""
    return t.is_meta or t.dtype == dtype or torch.equal(t.to(dtype).to(t.dtype), t)
