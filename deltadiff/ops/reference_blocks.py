"""The specification of the operations on whole blocks, as `reference.py` is of those on layers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import wide_dtype
from .reference import lora_linear_ref

_FORMULAS = {
    "silu": functional.silu,
    "gelu_tanh": lambda e: functional.gelu(e, approximate="tanh"),
    "gelu": functional.gelu,
}
ACTIVATIONS = tuple(_FORMULAS)


def gated_product_ref(e: Tensor, g: Tensor, activation: str) -> Tensor:
    """h = act(e) * g, computed in float32 (float64) and rounded once."""
    wide = wide_dtype(e.dtype)
    return (_FORMULAS[activation](e.to(wide)) * g.to(wide)).to(e.dtype)


def rms_norm_ref(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds_twice: bool = True
) -> tuple[Tensor, Tensor]:
    """(y, rstd): y = x rstd (offset + weight) with rstd = 1 / sqrt(mean(x^2) + eps) of each row.

    With ``rounds_twice``, x rstd is rounded to the dtype of x before it is multiplied, as Llama
    does; without, all is float32 until the end, as in Gemma.
    """
    rstd = torch.rsqrt(x.to(wide_dtype(x.dtype)).square().mean(-1) + eps)
    return rms_norm_again_ref(x, weight, rstd, offset, rounds_twice), rstd


def rms_norm_again_ref(
    x: Tensor, weight: Tensor, rstd: Tensor, offset: float, rounds_twice: bool
) -> Tensor:
    """y of `rms_norm_ref`, from the rstd that it gave."""
    wide = wide_dtype(x.dtype)
    normed, factor = x.to(wide) * rstd[..., None], weight.to(wide) + offset
    if rounds_twice:
        normed, factor = normed.to(x.dtype).to(wide), factor.to(x.dtype).to(wide)
    return (normed * factor).to(x.dtype)


class LowRankLinear(NamedTuple):
    """The arguments of one `lora_linear`, all but x; W is (out, in)."""

    weight: Any  # a Tensor; `gated_mlp` takes a `Quantised` too
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    bias: Tensor | None
    scaling: float


def gated_mlp_ref(
    x: Tensor, inner: Sequence[LowRankLinear], outer: LowRankLinear, activation: str
) -> Tensor:
    """down(act(gate(x)) * up(x)), where each of the three is a `lora_linear`.

    ``inner`` is the gate's layer and the one beside it, or one that computes the outputs of both.
    """

    def layer(x: Tensor, b: LowRankLinear) -> Tensor:
        return lora_linear_ref(
            x, b.weight, b.lora_A, b.lora_B, scaling=b.scaling, gate=b.gate, bias=b.bias
        )

    outputs = [layer(x, b) for b in inner]
    e, g = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
    return layer(gated_product_ref(e, g, activation), outer)
