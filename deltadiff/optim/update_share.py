"""`UpdateShare`: how much of one step's update reached W, measured on a few rows of each weight."""

import torch
from torch import Tensor

from ..layers.lora_layers import LoraLayer
from ..ops.reference import join_remainder
from .delta_lora import DeltaLoRA

ROWS = 16  # of each weight, which keeps the copies small


class UpdateShare:
    """Notes W, A and B before a step, and compares them with those after it.

    The share is <got, wanted> / <wanted, wanted> over the noted rows of all weights that are
    updated in place, with wanted = lambda s (B'A' - BA) and got the change of W, to which the
    remainder belongs that rounding="remainder" keeps beside it.
    """

    def __init__(self, optimizer: DeltaLoRA):
        self._noted = [
            (layer, update.ratio * layer.scaling, _joined(layer), *_factors(layer))
            for update in optimizer.weight_updates
            if update.inplace
            for layer in update.layers.values()
        ]

    @torch.no_grad()
    def measure(self) -> float | None:
        """The share; None where no weight was to be updated. Waits for the device."""
        got_wanted = wanted_wanted = 0.0
        for layer, scale, w, a, b in self._noted:
            a_now, b_now = _factors(layer)
            wanted = scale * (b_now @ a_now - b @ a)
            got_wanted += ((_joined(layer) - w) * wanted).sum().item()
            wanted_wanted += wanted.square().sum().item()
        started = any(n[0].delta is not None and n[0].delta.started() for n in self._noted)
        return got_wanted / wanted_wanted if started and wanted_wanted else None


def _joined(layer: LoraLayer) -> Tensor:
    """The first rows of W with their remainder, float64."""
    w, delta = layer.matrix.detach()[:ROWS], layer.delta
    if delta is None or delta.remainder is None:
        return w.to(torch.float64, copy=True)
    return join_remainder(w, delta.remainder[:ROWS]).double()


def _factors(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A, and the same rows of B, float64."""
    a, b = layer.lora_A.detach(), layer.lora_B.detach()[:ROWS]
    return a.to(torch.float64, copy=True), b.to(torch.float64, copy=True)
