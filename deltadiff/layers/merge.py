"""`merge_`: fold everything that was trained into the weights and put the eager layers back."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import dtype_name, wide_dtype
from ..errors import SwapError
from ..ops.reference import join_remainder
from ..text import align_columns
from .lora_linear import LoraLinear, lora_layers
from .pending_delta import LowRankFactors
from .swap import SELECTION, take_out
from .writable import check_writable

BLOCK = 2**22  # elements of a weight that are handled at once


@dataclass(frozen=True)
class MergeRow:
    """One merged layer; ``error`` is |rounded - exact| / |exact| of its weight (Frobenius)."""

    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What `merge_` did; prints as a table."""

    rows: tuple[MergeRow, ...]

    def __str__(self) -> str:
        cells = [("module", "out x in", "dtype", "relative error")]
        for r in self.rows:
            shape, dtype = f"{r.shape[0]} x {r.shape[1]}", dtype_name(r.dtype)
            cells.append((r.module, shape, dtype, f"{r.error:.2e}"))
        return align_columns(cells, right=(1,))


@torch.no_grad()
def merge_(model: nn.Module) -> MergeReport:
    """W += s B g A (and what Delta-LoRA holds beside W), in float32 and rounded once, in place.

    Afterwards the model is an ordinary eager model: no adapters, plain ``nn.Linear`` layers.

    Returns:
        A report with the relative rounding error of each weight; prints as a table.

    Raises:
        SwapError: the model has no swapped layer.
        ArgumentTypeError, ArgumentError: a weight that cannot be written (quantised, tied,
            shared); nothing was changed.
    """
    layers = lora_layers(model)
    if not layers:
        raise SwapError("model", "a model without swapped layers", "a model that `swap_` changed")
    check_writable(layers, [model])
    rows = []
    for name, layer in layers.items():
        w = layer.matrix
        rows.append(MergeRow(name, tuple(w.shape), w.dtype, _merge_layer(layer)))
    take_out(model, {layer: layer.base for layer in layers.values()})
    for note in ("_deltadiff_required_grad", SELECTION):
        model.__dict__.pop(note, None)
    return MergeReport(tuple(rows))


def _merge_layer(layer: LoraLinear) -> float:
    low = layer.delta.remainder if layer.delta is not None else None
    sums = torch.zeros(2, dtype=torch.float64, device=layer.weight.device)
    products = beside_weight(layer)
    rows = max(1, BLOCK // layer.in_features)
    for start in range(0, layer.out_features, rows):
        block = slice(start, start + rows)
        w = layer.matrix[block]
        wide = wide_dtype(w.dtype)
        exact = w.to(wide) if low is None else join_remainder(w, low[block])
        for p in products:
            exact = exact + p.B[block] @ p.A
        w.copy_(exact)
        sums += torch.stack([(w.to(wide) - exact).square().sum(), exact.square().sum()])
    lost, norm = sums.tolist()
    return math.sqrt(lost / norm) if norm else 0.0


def beside_weight(layer: LoraLinear) -> list[LowRankFactors]:
    """What the forward pass adds to W, as products of factors in float32 (float64 stays)."""
    wide = wide_dtype(layer.lora_A.dtype)

    def widen(t: Tensor) -> Tensor:
        return t.detach().to(wide)

    b = layer.scaling * widen(layer.lora_B)
    b = b if layer.gate is None else b * widen(layer.gate)
    products = [LowRankFactors(b, widen(layer.lora_A), False)]
    if layer.delta is not None:
        products += [p for p in layer.delta.past_updates or () if not p.in_weight]
        if not layer.delta.in_weight and layer.delta.started():
            products.append(layer.delta.product(layer.lora_A, layer.lora_B, layer.scaling))
    return products
