"""`fuse_` and `unfuse_`: give PEFT's layers in a model the fused forward pass, and take it away."""

from collections.abc import Collection
from typing import Any

from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...errors import SwapError
from ..loading_check import unwatch_loading, watch_loading
from ..targets.weight_readers import find_readers
from .fused_linear import Deltas, Fused, FusedLinear, FusedTorchaoLinear
from .rules import kind_of
from .tuner_models import TUNER_MODELS


def fused_class(module: nn.Module) -> type[Fused] | None:
    """The class that makes a layer of PEFT faster, or has done so; None where there is none."""
    kind = type(module)
    if issubclass(kind, Fused):
        return kind
    if kind is lora.Linear:
        return FusedLinear
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit"):
        from .fused_linear_4bit import FusedLinear4bit

        return FusedLinear4bit
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.torchao", "TorchaoLoraLinear"):
        return FusedTorchaoLinear
    return None


def fuse_(layers: Collection[Any], model: nn.Module, backend: str | None) -> None:
    """Give these layers of ``model`` the fused forward pass; their parameters stay as they are."""
    for layer in layers:
        if not isinstance(layer, Fused):
            layer.__class__ = fused_class(layer)
            layer.deltas = Deltas()
        layer.backend = backend
    for module in model.modules():
        if type(module) in TUNER_MODELS:
            module.__class__ = TUNER_MODELS[type(module)]
    watch_loading(model)


def unfuse_(model: nn.Module) -> None:
    """Give PEFT's layers their own class back.

    Raises:
        SwapError: a layer holds an update of Delta-LoRA, of which PEFT knows nothing.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fused)}
    for name, layer in layers.items():
        if any(delta.changes_model() for delta in layer.deltas.values()):
            given = "a layer of PEFT with an update of Delta-LoRA, which PEFT cannot hold"
            accepted = "`model.merge_and_unload()`, or `export_peft` and the base model"
            raise SwapError(name, given, accepted)
    for layer in layers.values():
        for name in ("deltas", "backend", "_route"):
            layer.__dict__.pop(name, None)
        layer.__class__ = layer.peft_class
    pefts = {ours: theirs for theirs, ours in TUNER_MODELS.items()}
    for module in model.modules():
        if type(module) in pefts:
            module.__class__ = pefts[type(module)]
    unwatch_loading(model)


def why_not_fusable(module: nn.Module) -> str | None:
    """None for a layer of PEFT that `fuse_` takes, else the reason in words."""
    kind = type(module)
    if "forward" in vars(module):
        holder = getattr(vars(module)["forward"], "__self__", None)
        if holder is not module and type(holder).__module__.startswith("peft."):
            return f"{kind_of(holder)}, which holds its forward pass"
        return "hooks that hold its forward pass: call `swap_` before they are put on"
    if fused_class(module) is not None:
        return None
    if isinstance(module, lora.Linear) and kind.__name__.startswith("FSDP"):
        return "it is sharded: call `swap_` before `fully_shard`"
    return kind_of(module)


def tuner_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of PEFT in a model by name, of LoRA and of other tuners."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def describe_others(model: nn.Module) -> list[str]:
    """A line for each kind of PEFT's layers that are not faster, or not always, with the reason."""
    readers, layers = find_readers(model), tuner_layers(model)
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in layers.items():
        inside = any(name.startswith(f"{other}.") for other in layers)  # that one reads it rightly
        if not isinstance(module, Fused):
            reason = why_not_fusable(module) or "`swap_` was not called since it was added"
            found.setdefault(("run its own forward pass", reason), []).append(name)
        elif module in readers and not inside:  # then its pair gets no gradient in PEFT's model
            found.setdefault(("may have no part in the model", readers[module]), []).append(name)
    return [
        f"{len(names)} of PEFT's layers {what}: {reason} ({names[0]}"
        f"{', ...' if len(names) > 1 else ''})"
        for (what, reason), names in found.items()
    ]
