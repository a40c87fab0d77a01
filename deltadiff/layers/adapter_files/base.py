"""The base model of an adapter: which of its layers and tensors the adapter is about."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError
from ..linear import is_conv1d, linear_shape
from ..lora_layers import lora_layers
from ..lora_linear import LoraLinear
from ..plain_names import Held, by_plain_name, held_tensors, plain_name
from ..swap import swap_, unswap_


def linear_modules(model: nn.Module) -> dict[str, Any]:
    """The linear layers, eager or swapped, by plain name."""
    named = model.named_modules()
    return by_plain_name((n, m) for n, m in named if isinstance(m, nn.Linear) or is_conv1d(m))


def base_shapes(
    linear: Mapping[str, Any], layers: Collection[str], beside: Mapping[str, Held]
) -> dict[str, list[int]]:
    """The entry ``base`` for these layers, as far as they are there, and what is held beside."""
    shapes = {}
    for name in layers:
        if name in linear:
            shapes[f"{name}.weight"] = list(linear_shape(linear[name]))
            if linear[name].bias is not None:
                shapes[f"{name}.bias"] = list(linear[name].bias.shape)
    return shapes | {name: list(held.logical.shape) for name, held in beside.items()}


def turn_saved(config: dict, tensors: dict[str, Tensor], held: Mapping[str, Held]) -> None:
    """Turn what version 1 saved of a `Conv1D` from (in, out) to (out, in)."""
    for name in config["saved"]:
        if name in held and held[name].logical is not held[name].tensor:
            tensors[f"{name}.saved"] = tensors[f"{name}.saved"].T
            config["base"][name] = config["base"][name][::-1]


def swap_as_saved(
    model: nn.Module, folder: str | os.PathLike, entries: dict[str, dict], backend: str | None
) -> None:
    """Swap the layers of an adapter, with a call for each combination of rank and dropout.

    Raises:
        CheckpointError, ArgumentError: a layer cannot be swapped; the model is as it was.
    """
    groups: dict[tuple, set[str]] = {}
    for name, c in entries.items():
        groups.setdefault((c["r"], c.get("lora_dropout", 0.0)), set()).add(name)
    try:
        for (r, dropout), names in groups.items():
            swap_(
                model, r=r, lora_dropout=dropout, backend=backend, target_modules=_named(names)
            )  # fmt: skip
        left = entries.keys() - {plain_name(name) for name in lora_layers(model)}
        if left:
            accepted = "a layer that `swap_` takes in this model"
            raise CheckpointError(str(folder), f"an adapter of {min(left)}", accepted)
    except BaseException:
        if lora_layers(model):
            unswap_(model)
        raise


def _named(names: set[str]) -> Callable[[str, nn.Module], bool]:
    """A choice of ``target_modules`` by plain names."""
    return lambda name, _: plain_name(name) in names


def trained_beside(
    model: nn.Module, layers: Mapping[str, LoraLinear]
) -> tuple[dict[str, Held], dict[str, str]]:
    """The trained parameters that belong to no pair, and the buffers of the modules they are in.

    Returns:
        They by name, and for each further name of a tied one the name that it is listed under.
    """
    pairs = {id(p) for layer in layers.values() for p in layer.adapter}
    held = {n: h for n, h in held_tensors(model).items() if id(h.tensor) not in pairs}
    owners = {h.owner for h in held.values() if h.tensor.requires_grad}
    found: dict[str, Held] = {}
    tied: dict[str, str] = {}
    first: dict[Tensor, str] = {}
    for name, h in held.items():
        if h.tensor.requires_grad or (h.owner in owners and not isinstance(h.tensor, nn.Parameter)):
            if first.setdefault(h.tensor, name) == name:
                found[name] = h
            else:
                tied[name] = first[h.tensor]
    return found, tied


def check_saved(
    folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor], held: Mapping[str, Held]
) -> None:
    """Raise CheckpointError where what was trained beside the layers cannot go where it belongs."""
    for name in config["saved"]:
        saved, own = tensors[f"{name}.saved"], held[name].tensor
        if saved.is_floating_point() != own.is_floating_point():
            given = f"{name} of {saved.dtype}"
            raise CheckpointError(str(folder), given, f"{own.dtype} as in this model")
    for alias, name in config.get("tied", {}).items():
        if alias in held and held[alias].tensor is not held[name].tensor:
            given = f"{alias} and {name}, which are one weight there"
            raise CheckpointError(str(folder), given, "two weights as in this model")
