"""How the base weight of a layer is stored: the one table that knows what each format allows.

A *dense* weight holds ordinary floating-point numbers: `lora_linear` multiplies by it, and
Delta-LoRA and `merge_` write into it. Only the base layer's own forward pass can multiply by a
*quantised* weight; the low-rank branch is added to the result, and the weight is never written.

To support another format, write its forward pass here and make `base_format` find its entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import DTYPES, HALF_DTYPES
from ..ops.dispatch import choose_path
from ..ops.lora_linear import lora_linear
from .linear import linear_shape

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
        quantised: True where no kernel of `lora_linear` can multiply by the weight.
        writable: whether an update may be written into the weight.
        adapter_dtypes: the dtypes that A and B may have, the default last.
    """

    forward: Callable[["LoraLinear", Tensor, Tensor, Tensor, float, Tensor | None, float], Tensor]
    quantised: bool
    writable: bool
    adapter_dtypes: tuple[torch.dtype, ...]


def base_format(weight: Tensor) -> BaseFormat:
    """The format in which ``weight`` is stored."""
    return _DENSE.get(weight.dtype, _QUANTISED)


def check_backend(base_layer: "LinearLayer", r: int, dropout: float, backend: str | None) -> None:
    """Raise BackendUnavailableError where ``backend`` cannot run a branch beside this layer."""
    w = base_layer.weight
    if not base_format(w).quantised:
        choose_path(w.device, w.dtype, backend, (*linear_shape(base_layer), r), dropout > 0)


def fused_branch(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gate: Tensor | None,
    dropout: float,
    backend: str | None,
) -> Tensor:
    """One call of `lora_linear`; with dropout, PyTorch's generator gives the seed of the mask."""
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout else 0
    return lora_linear(
        x, matrix, a, b, scaling=scaling, gate=gate, bias=bias,
        dropout=dropout, seed=seed, backend=backend,
    )  # fmt: skip


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


def _dense(dtype: torch.dtype) -> BaseFormat:
    adapter_dtypes = (dtype, torch.float32) if dtype in HALF_DTYPES else (dtype,)
    return BaseFormat(_fused, quantised=False, writable=True, adapter_dtypes=adapter_dtypes)


_DENSE = {dtype: _dense(dtype) for dtype in DTYPES}
_QUANTISED = BaseFormat(
    _beside_base_layer, quantised=True, writable=False, adapter_dtypes=(torch.float32,)
)
