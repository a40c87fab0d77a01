"""Vectors in the place of parameters: what DeepSpeed's ZeRO makes of an optimizer's groups.

ZeRO puts one vector into each param group, the part of all its parameters that this process trains,
and calls the optimizer's step with one group after the other. AdamW is elementwise, so it trains
vectors as it trains parameters. After the step ZeRO brings the new values into the pairs of the
model: into whole ones (ZeRO-1 and 2), or into partitioned ones, which it gathers for each use.

A factored update of W needs no more than the pairs as they were before certain steps, the anchors.
Until ZeRO steps, the pairs are as the last step left them, so the anchors can be taken then. What
a step makes of the pairs, `PendingDelta.expect` takes at the next use. An update in place would
need A' - A and B' - B in the step, of which each process has some elements.

A state holds all of this in its param group, which DeepSpeed's universal checkpoints keep as it is.
Of the entry of a vector they keep the moments alone. They are loaded without a call of the
optimizer: its moments are replaced, and the values of its groups are set one by one. Then a
`WatchedGroup` gives the layers their updates, and the next step takes the rest, see `Resumable`.
DeepSpeed itself refuses to load the elastic checkpoints of such an optimizer.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer, lora_layers
from ..layers.pending_delta import PendingDelta
from ..ranks import is_sharded, whole_shape
from .saved_state import PREFIX, saved_int, take_update

UPDATES = "updates"  # what a run's state has them under
# What that is, of each factor; see `layers.saved_update`.
KEYS = {"lora_A": {"anchor"}, "lora_B": {"anchor", "update", "past_A", "past_B"}}
INSTEAD = "DDP or `fully_shard`"


def holds_vectors(modules: Sequence[nn.Module], params: Collection[Tensor]) -> bool:
    """Whether something flattened the parameters of these modules into the optimizer's."""
    held = {p for module in modules for p in module.parameters()}
    return bool(held) and held.isdisjoint(params) and not any(map(is_sharded, params))


def check_vectors(
    modules: Sequence[nn.Module],
    params: Collection[Tensor],
    groups_before: int,
    skip_nonfinite: bool,
) -> None:
    """Raise ArgumentError where an optimizer could not train its groups as vectors of ZeRO.

    ``groups_before``: how many groups there were when the launches were last prepared.
    """
    if not holds_vectors(modules, params):
        return
    if groups_before > 1:
        given = f"{groups_before} groups under DeepSpeed's ZeRO, which steps with one after another"
        raise ArgumentError("param_groups", given, f"one group under ZeRO, or {INSTEAD}")
    if skip_nonfinite:
        given = "True under DeepSpeed's ZeRO, where each process would look at its own part"
        accepted = 'False, and "check_grad_overflow" under "bf16" of DeepSpeed\'s configuration'
        raise ArgumentError("skip_nonfinite", given, accepted)


def check_no_vectors(modules: Sequence[nn.Module], params: Collection[Tensor]) -> None:
    """Raise ArgumentError where ZeRO flattened the parameters of swapped layers, for a method that
    needs them as they are.
    """
    if any(map(lora_layers, modules)) and holds_vectors(modules, params):
        given = "vectors of flattened parameters, as of DeepSpeed's ZeRO, without pairs"
        accepted = f"under ZeRO `DeltaLoRA(w_update='factored')` or update_ratio=0; {INSTEAD}"
        raise ArgumentError("model_or_params", given, accepted)


def check_update(
    pairs: Mapping[str, LoraLayer], vectors: Collection[Tensor], w_update: str | None
) -> None:
    """Raise ArgumentError where the update of a layer cannot follow its pair under ZeRO."""
    for name, layer in pairs.items():
        if w_update == "inplace":
            given = "'inplace' under DeepSpeed's ZeRO, whose step leaves A' and B' in parts"
            accepted = f"'factored' or update_ratio=0 under ZeRO, or {INSTEAD}"
            raise ArgumentError("w_update", given, accepted)
        device = layer.lora_A.device
        for vector in vectors:
            if vector.device != device:
                given = f"{name} on {device}, which DeepSpeed trains on {vector.device}"
                accepted = '"offload_optimizer" of DeepSpeed off, or update_ratio=0'
                raise ArgumentError("model_or_params", given, accepted)


def pack(name: str, kept: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a state has of a layer; ``kept``: the entries of lora_A and lora_B.

    The pair after the last step is not in it, for ZeRO's own state brings that back.
    """
    return {
        f"{name}.{factor}.{key}": t
        for factor, entry in zip(KEYS, kept, strict=True)
        for key, t in entry.items()
        if key in KEYS[factor]
    }


def unpack(updates: object, names: Mapping[LoraLayer, str]) -> dict[Tensor, dict[str, Any]]:
    """What `pack` made of each layer, as the entries of lora_A and lora_B.

    ``names``: of the model's layers.

    Raises:
        ArgumentError: it is no such dict; a part of a layer is missing; the anchors have another
            shape; layers that are not in this model.
    """
    if not isinstance(updates, dict):
        given = f"updates: {type(updates).__name__}"
        raise ArgumentError("state_dict", given, "what `state_dict()` gives under ZeRO")
    left, found = dict(updates), dict[Tensor, dict[str, Any]]()
    for layer, name in names.items():
        own: dict[str, dict[str, Any]] = {}
        for factor, keys in KEYS.items():
            places = {key: f"{name}.{factor}.{key}" for key in keys}
            own[factor] = {k: left.pop(place) for k, place in places.items() if place in left}
        if not any(own.values()):
            continue
        for p, (factor, keys) in zip((layer.lora_A, layer.lora_B), KEYS.items(), strict=True):
            missing = sorted(keys - own[factor].keys())
            if missing:
                given = f"no {', '.join(missing)} of {name}.{factor}"
                raise ArgumentError("state_dict", given, "what `state_dict()` gives under ZeRO")
            anchor, shape = own[factor]["anchor"], tuple(whole_shape(p))
            fits = isinstance(anchor, Tensor) and anchor.is_floating_point() and not anchor.is_meta
            if not fits or tuple(anchor.shape) != shape:
                given = f"{tuple(anchor.shape)}" if fits else type(anchor).__name__
                raise ArgumentError(f"anchor of {name}.{factor} in state_dict", given, f"{shape}")
            found[p] = own[factor]
    if left:
        given = f"updates of {sorted(map(str, left))[0]:.80}"
        raise ArgumentError("state_dict", given, "those of this model's layers")
    return found


class WatchedGroup(dict):
    """A param group that calls a method, ``taken(group)``, after updates were put into it.

    They come last of what a state has of a group. A copy is a plain dict, which is not watched.
    """

    def __init__(self, group: dict[str, Any], taken: WeakMethod):
        super().__init__(group)
        self._taken = taken

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        taken = self._taken() if name == PREFIX + UPDATES else None
        if taken is not None:
            taken(self)

    def __reduce__(self) -> tuple:
        return dict, (dict(self),)


def check_complete(wanted: Collection[str], found: Collection[str]) -> None:
    """Raise ArgumentError where a state lacks a layer that has an update; both by names.

    The pair of such a layer is not restored yet, so no update can begin with it.
    """
    missing = sorted({*wanted} - {*found})
    if missing:
        given = f"no update of {missing[0]}"
        raise ArgumentError("state_dict", given, "a state of the same layers under ZeRO")


def give_updates(
    group: dict[str, Any], names: Mapping[LoraLayer, str], updated: Collection[str]
) -> None:
    """Give the layers of a model the updates that a state has put into a param group.

    The pairs get their values after this.

    Args:
        names: of the model's layers.
        updated: those that the optimizer updates.

    Raises:
        ArgumentError: the updates do not fit the layers, or lack one; no layer was changed.
    """
    entries, found = unpack(group[PREFIX + UPDATES], names), dict[LoraLayer, PendingDelta]()
    for layer, name in names.items():
        if layer.lora_B not in entries:
            continue
        of_A, of_B = entries[layer.lora_A], entries[layer.lora_B]
        anchor_A, anchor_B = of_A["anchor"].to(layer.lora_A), of_B["anchor"].to(layer.lora_B)
        saved = take_update(name, of_B, layer, inplace=False)
        assert saved is not None  # `unpack` found it
        started = saved_int("iteration", group[f"{PREFIX}iteration"], 0) > group["start_step"] + 1
        flag = torch.zeros((), dtype=torch.int32, device=anchor_A.device)
        found[layer] = PendingDelta(
            anchor_A, anchor_B, torch.empty_like(anchor_A), torch.empty_like(anchor_B),
            saved.update_ratio, saved.scaling,
            PendingDelta.make_rank_scale(saved.update_ratio, len(anchor_A), anchor_A, started),
            in_weight=False, past_updates=saved.past_updates, unseen=(flag, flag),
        )  # fmt: skip
    check_complete(updated if group["update_ratio"] else (), [names[layer] for layer in found])
    for layer, delta in found.items():
        delta.expect(layer.lora_A, layer.lora_B)
        layer.delta = delta
