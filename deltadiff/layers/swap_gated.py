"""`swap_gated_`: `swap_` for methods that train what stands between the factors of a pair."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentTypeError
from .linear import refuse_peft
from .lora_layers import lora_layers
from .lora_linear import LoraLinear
from .report import SwapReport, swap_report
from .swap import swap_


@torch.no_grad()
def swap_gated_(
    model: nn.Module,
    method: str,
    *,
    r: int,
    lora_alpha: float | None,
    seed: int | None,
    gate: tuple[int, ...],
    std: float,
    **options: Any,
) -> SwapReport:
    """Put in layers of rank r with Gaussian A and B, and with a gate that is trained from 0 on.

    Args:
        method: its name, for errors.
        lora_alpha: None is r, so that the branch is scaled by 1.
        gate: the shape of the gate.
        std: the standard deviation of A and B.
        model, seed, options: as for `swap_`.

    Raises:
        ArgumentTypeError, ArgumentError, BackendUnavailableError: as for `swap_`, and for a model
            with PEFT's layers; nothing was changed.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    refuse_peft(method, model)
    before = set(lora_layers(model).values())
    alpha = r if lora_alpha is None else lora_alpha
    notes = swap_(model, r=r, lora_alpha=alpha, seed=seed, **options).notes
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        if layer not in before and isinstance(layer, LoraLinear):
            for p in (layer.lora_A, layer.lora_B):
                p.copy_(torch.empty(p.shape).normal_(std=std, generator=generator))
            layer.gate = nn.Parameter(layer.lora_A.new_zeros(gate))
    return replace(swap_report(model), notes=notes)  # with the gates among what is trained
