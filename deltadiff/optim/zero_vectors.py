"""Vectors in the place of parameters: what DeepSpeed's ZeRO makes of an optimizer's groups.

ZeRO puts one vector into each param group, the part of all its parameters that this process trains,
and calls the optimizer's step with one group after the other. AdamW is elementwise, so it trains
vectors as it trains parameters. After the step ZeRO brings the new values into the pairs of the
model: into whole ones (ZeRO-1 and 2), or into partitioned ones, which it gathers for each use.

A factored update of W needs no more than the pairs as they were before certain steps, the anchors.
Until ZeRO steps, the pairs are as the last step left them, so the anchors can be taken then. What
a step makes of the pairs, `PendingDelta.expect` takes at the next use. An update in place would
need A' - A and B' - B in the step, of which each process has some elements.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer, lora_layers
from ..ranks import is_sharded, whole_shape

PREFIX = "deltadiff."  # of what the entry of a vector holds of a layer
# What that is, of each factor; see `saved_update`.
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
    """What the entry of a vector gets of a layer; ``kept``: the entries of lora_A and lora_B.

    The pair after the last step is not in it, for ZeRO's own state brings that back.
    """
    return {
        f"{PREFIX}{name}.{factor}.{key}": t
        for factor, entry in zip(KEYS, kept, strict=True)
        for key, t in entry.items()
        if key in KEYS[factor]
    }


def unpack(entry: dict[str, Any], names: Mapping[LoraLayer, str]) -> dict[Tensor, dict[str, Any]]:
    """The entries of lora_A and lora_B that `pack` put into that of a vector, removed from it.

    Raises:
        ArgumentError: a part of what the state says of a layer is missing, or the anchors have
            another shape.
    """
    found: dict[Tensor, dict[str, Any]] = {}
    for layer, name in names.items():
        own: dict[str, dict[str, Any]] = {}
        for factor, keys in KEYS.items():
            places = {key: f"{PREFIX}{name}.{factor}.{key}" for key in keys}
            own[factor] = {k: entry.pop(place) for k, place in places.items() if place in entry}
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
    return found
