"""How the base weight of a layer is stored: the one table that knows what each format allows.

A *dense* weight holds ordinary floating-point numbers: `lora_linear` multiplies by it, and
Delta-LoRA and `merge_` write into it. A *quantised* weight is never written. `lora_linear` decodes
the 4 bits of bitsandbytes (see `four_bit`) and FP8 (see `fp8`). Only the base layer's own forward
pass can multiply by other formats; the low-rank branch is added to the result.

To support another format, write its forward pass here and make `base_format` find its entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import DTYPES, HALF_DTYPES
from ..ops.dispatch import Dispatch, choose_path
from ..ops.quantised import Quantised
from ..ranks import is_sharded
from .four_bit import FOUR_BIT, is_four_bit, is_four_bit_layer, stores_four_bits
from .fp8 import FP8, stores_fp8
from .fused_branch import fused_branch
from .linear import is_conv1d, linear_shape
from .quantised_format import QuantisedFormat

if TYPE_CHECKING:
    from .linear import LinearLayer
    from .lora_linear import LoraLinear


@dataclass(frozen=True)
class BaseFormat:
    """What a layer whose weight is stored in this format can do.

    Attributes:
        forward: computes y from (layer, x, A, B, scaling, gate, dropout), for x (...,
            in_features), A (rank, in_features), B (out_features, rank), gate None or on the rank,
            and the probability of dropout.
        weight: what `lora_linear` multiplies by, from (layer, x, rank); None where the forward pass
            is not one call of it.
        path: what runs the layer, and why, for (base layer, rank, dropout, backend).
        writable: whether an update may be written into the weight.
        adapter_dtypes: the dtypes that A and B may have, the default last.
    """

    forward: Callable[["LoraLinear", Tensor, Tensor, Tensor, float, Tensor | None, float], Tensor]
    weight: Callable[["LoraLinear", Tensor, int], Tensor | Quantised | None]
    path: Callable[[Any, int, float, str | None], Dispatch]
    writable: bool
    adapter_dtypes: tuple[torch.dtype, ...]


def base_format(module: nn.Module) -> BaseFormat:
    """The format in which the weight of a linear layer is stored, also of a swapped one."""
    weight: Any = module.weight
    base = getattr(module, "base_layer", module)
    if is_four_bit(weight) or stores_four_bits(base):
        return _FOUR_BIT
    return _FP8 if stores_fp8(base) else _DENSE.get(weight.dtype, _QUANTISED)


def quantised_format(base: nn.Module) -> QuantisedFormat | None:
    """How `lora_linear` decodes the weight of a layer; None where it does not."""
    if is_four_bit_layer(base):
        return FOUR_BIT
    return FP8 if stores_fp8(base) else None


def check_backend(base_layer: "LinearLayer", r: int, dropout: float, backend: str | None) -> None:
    """Raise BackendUnavailableError where ``backend`` cannot run a branch beside this layer."""
    base_format(base_layer).path(base_layer, r, dropout, backend)


def _fused(
    layer: "LoraLinear",
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gate: Tensor | None,
    dropout: float,
) -> Tensor:
    return fused_branch(x, layer.matrix, layer.bias, a, b, scaling, gate, dropout, layer.backend)


def _beside_base_layer(
    layer: "LoraLinear",
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gate: Tensor | None,
    dropout: float,
) -> Tensor:
    """The output of the base layer plus the low-rank branch, in the dtype of x."""
    s = nn.functional.dropout(x, dropout) @ a.to(x.dtype).T
    s = s if gate is None else s * gate.to(x.dtype)
    return layer.base_layer(x) + scaling * (s @ b.to(x.dtype).T)


def _dense_weight(layer: "LoraLinear", x: Tensor, r: int) -> Tensor | None:
    return None if is_sharded(layer.weight) else layer.matrix


def _no_weight(layer: "LoraLinear", x: Tensor, r: int) -> None:
    return None


def _dense_path(base: Any, r: int, dropout: float, backend: str | None) -> Dispatch:
    w, layer = base.weight, (*linear_shape(base), r)
    return choose_path(w.device, w.dtype, backend, layer, dropout > 0, is_conv1d(base))


def _own_product(base: Any, r: int, dropout: float, backend: str | None) -> Dispatch:
    return Dispatch("reference", f"{base.weight.dtype} weight: the base layer's own product")


def _dense(dtype: torch.dtype) -> BaseFormat:
    adapter_dtypes = (dtype, torch.float32) if dtype in HALF_DTYPES else (dtype,)
    return BaseFormat(_fused, _dense_weight, _dense_path, True, adapter_dtypes)


def _quantised(forward: Any, weight: Any, path: Any) -> BaseFormat:
    return BaseFormat(forward, weight, path, False, (torch.float32,))


def _decoded(form: QuantisedFormat) -> BaseFormat:
    """A format whose weights `lora_linear` decodes itself, where it runs the layer."""

    def forward(
        layer: "LoraLinear",
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        gate: Tensor | None,
        dropout: float,
    ) -> Tensor:
        base, backend = layer.base_layer, layer.backend
        weight, dtype = form.weight_of(base), form.compute_dtype(base, x)
        if isinstance(weight, str) or not form.runs_fused(
            weight, dtype, a.shape[0], dropout, backend
        ):
            return _beside_base_layer(layer, x, a, b, scaling, gate, dropout)
        return form.branch(x, base, weight, a, b, scaling, gate, dropout, backend)

    def weight(layer: "LoraLinear", x: Tensor, r: int) -> Quantised | None:
        if is_sharded(layer.weight):
            return None
        found = form.weight_of(layer.base_layer)
        if isinstance(found, str) or form.changes_dtype(layer.base_layer, x):
            return None
        return found if form.runs_fused(found, x.dtype, r, 0.0, layer.backend) else None

    return _quantised(forward, weight, form.path)


_DENSE = {dtype: _dense(dtype) for dtype in DTYPES}
_FOUR_BIT, _FP8 = _decoded(FOUR_BIT), _decoded(FP8)
_QUANTISED = _quantised(_beside_base_layer, _no_weight, _own_product)
