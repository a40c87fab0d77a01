"""`swap_` on a PEFT model: its layers stay PEFT's and get a faster forward pass."""

import warnings
from typing import Any

from torch import nn

from ..errors import ArgumentError, SwapError
from .base_format import check_backend
from .lean.swap import make_lean_
from .linear import is_peft
from .lora_layers import lora_layers
from .report import SwapReport, swap_report
from .targets.choose import Targets, choose_modules


def swap_peft_(
    model: nn.Module, target_modules: Targets, backend: str | None, lean: bool | None
) -> SwapReport:
    """`swap_` for a PEFT model."""
    from .peft.fuse import fuse_, tuner_layers, why_not_fusable

    layers = tuner_layers(model)
    fusable = {n: m for n, m in layers.items() if why_not_fusable(m) is None}
    if not fusable:
        reasons = sorted({str(why_not_fusable(m)) for m in layers.values()})
        given = f"a PEFT model without a layer to make faster ({'; '.join(reasons) or 'no layers'})"
        raise SwapError("model", given, "layers of LoRA on nn.Linear, Conv1D, Linear4bit or FP8")
    if target_modules != "all-linear":
        chosen = choose_modules(model, target_modules)
        for name, module in chosen.items():
            if not is_peft(module):
                accepted = "PEFT's layers; add the others to LoraConfig(target_modules=...)"
                raise ArgumentError(
                    "target_modules", f"{name}, which PEFT does not adapt", accepted
                )
            if name not in fusable:
                reason = str(why_not_fusable(module))
                raise ArgumentError("target_modules", f"{name}: {reason}", "LoRA on nn.Linear")
        fusable = {name: fusable[name] for name in chosen}
    for layer in fusable.values():
        _check_backend(layer, backend)
    fuse_(fusable.values(), model, backend)
    make_lean_(model, lean)
    report = swap_report(model)
    active = [layer for layer in lora_layers(model).values() if layer.active]
    if all(layer.dispatch.backend == "peft" for layer in active):
        reason = active[0].dispatch.reason if active else "it has no active adapter"
        warnings.warn(f"no layer of this model became faster: {reason}", stacklevel=3)
    return report


def _check_backend(layer: Any, backend: str | None) -> None:
    """Raise BackendUnavailableError where ``backend`` cannot run a plain adapter of the layer."""
    from .peft.rules import why_peft

    if why_peft(layer) is not None:
        return
    for name, a in layer.lora_A.items():
        dropout = getattr(layer.lora_dropout[name], "p", 0.0)
        check_backend(layer.get_base_layer(), a.weight.shape[0], dropout, backend)
