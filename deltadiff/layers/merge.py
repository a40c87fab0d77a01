"""`merge_`: fold everything that was trained into the weights and put the eager layers back."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import dtype_name, wide_dtype
from ..ops.reference import join_remainder
from ..ranks import add_up, check_not_partitioned, local, own_part, reshard, whole
from ..text import align_columns
from .fsdp_places import check_replaceable
from .gate import times_gate
from .loading_check import unwatch_loading
from .lora_layers import LoraLayer
from .lora_linear import LoraLinear, own_layers
from .low_rank_factors import LowRankFactors
from .model_notes import drop_notes
from .saturation import saturated_message
from .swap import take_out
from .writable import check_writable

_BLOCK = 2**22  # elements of a weight that are merged at once, which bounds the temporary memory


@dataclass(frozen=True)
class MergeRow:
    """One merged layer.

    Attributes:
        module: name of the layer.
        shape: (out_features, in_features).
        dtype: dtype of the weight.
        error: |rounded - exact| / |exact| of the weight, in the Frobenius norm.
    """

    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What `merge_` did; it prints as a table."""

    rows: tuple[MergeRow, ...]

    def __str__(self) -> str:
        cells = [("module", "out x in", "dtype", "relative error")]
        for r in self.rows:
            shape, dtype = f"{r.shape[0]} x {r.shape[1]}", dtype_name(r.dtype)
            cells.append((r.module, shape, dtype, f"{r.error:.2e}"))
        return align_columns(cells, right=(1,))


@torch.no_grad()
def merge_(model: nn.Module) -> MergeReport:
    """Add s B g A, and what Delta-LoRA holds beside W, to the weight of each layer, in place.

    The sum is formed in float32 (float64 for a float64 weight) and rounded once. What is past the
    range of a float16 weight becomes its largest value, and a warning says so. Afterwards the
    model is an ordinary eager model: no adapters, plain ``nn.Linear`` layers.

    Of a model that FSDP shards, all processes call this. Each adds to its own part of W, and the
    model stays sharded. Optimizers that hold its pairs are of no use any more.

    Returns:
        A report with the relative rounding error of each weight; it prints as a table.

    Raises:
        SwapError: the model has no swapped layer, or has layers of PEFT; or `fully_shard` was
            called on a layer itself, which another one is to replace, or tensor parallelism splits
            one; or a weight became another than the one that its remainder belongs to.
        ArgumentTypeError, ArgumentError: a weight that cannot be written (quantised, tied,
            shared); nothing was changed.
    """
    check_not_partitioned("merge_", model)
    layers = own_layers(model, "merge_", "`model.merge_and_unload()`")
    check_replaceable("merge_", model, layers)
    for name, layer in layers.items():
        if layer.delta is not None:
            layer.delta.check_remainder(name, layer.weight)
    reshard(model)
    check_writable(layers, [model])
    rows, past = [], dict[str, int]()
    for name, layer in layers.items():
        n, k = layer.matrix.shape
        error, saturated = _merge_layer(layer)
        rows.append(MergeRow(name, (n, k), layer.weight.dtype, error))
        past |= {name: saturated} if saturated else {}
    take_out(model, {layer: layer.base_layer for layer in layers.values()})
    drop_notes(model)
    unwatch_loading(model)
    if past:
        warnings.warn(saturated_message("merging took", past), stacklevel=3)
    return MergeReport(tuple(rows))


def _merge_layer(layer: LoraLinear) -> tuple[float, int]:
    """Write the merged weight block by block.

    Returns its relative rounding error, and how many finite elements are past the range of its
    dtype: they get its largest value, not inf.
    """
    low = None if layer.delta is None else local(layer.delta.remainder)
    matrix = local(layer.matrix)
    sums = torch.zeros(3, dtype=torch.float64, device=layer.weight.device)
    most = torch.finfo(layer.weight.dtype).max
    products = [_own_part(p, layer) for p in branch_products(layer)]
    rows = max(1, _BLOCK // layer.in_features)
    for start in range(0, len(matrix), rows):
        block = slice(start, start + rows)
        w = matrix[block]
        wide = wide_dtype(w.dtype)
        exact = w.to(wide) if low is None else join_remainder(w, low[block])
        for p in products:
            exact = exact + p.B[block] @ p.A
        past = exact.to(w.dtype).isinf() & exact.isfinite()
        w.copy_(torch.where(past, exact.clamp(-most, most), exact))
        lost = (w.to(wide) - exact).square().sum()
        sums += torch.stack([lost, exact.square().sum(), past.sum()])
    add_up(sums, layer.weight)
    lost, norm, saturated = sums.tolist()
    return math.sqrt(lost / norm) if norm else 0.0, int(saturated)


def _own_part(product: LowRankFactors, layer: LoraLayer) -> LowRankFactors:
    """The factors of what this process holds of W: some rows, or some columns of a Conv1D's."""
    if layer.transposed:
        a = own_part(product.A.T, layer.weight).T
        return LowRankFactors(product.B, a, product.in_weight)
    return LowRankFactors(own_part(product.B, layer.weight), product.A, product.in_weight)


def branch_products(layer: LoraLayer) -> list[LowRankFactors]:
    """The products that the forward pass adds to W, as factors in float32 (or float64).

    The factors are whole, also those of a sharded layer, for which all processes call this.
    """
    wide = wide_dtype(layer.lora_A.dtype)

    def widen(t: Tensor) -> Tensor:
        return whole(t).to(wide)

    b = layer.scaling * widen(layer.lora_B)
    b = b if layer.gate is None else times_gate(b, widen(layer.gate))
    products = [LowRankFactors(b, widen(layer.lora_A), in_weight=False)]
    if layer.delta is not None:
        products += layer.delta.unwritten()
    return products
