"""The specification of all that is computed in FP8, as `reference.py` is of the rest.

Scales belong to blocks of (rows, columns). Blocks at the right and lower edges may be cut off.
"""

from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


def decode_fp8_ref(
    data: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """W (N, K) = data * scale, with one scale for each block of ``data``.

    The product of float32 numbers is rounded once to ``dtype``.
    """
    return (data.to(torch.float32) * _for_each(scale, block, data.shape)).to(dtype)


def quantise_fp8_ref(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(data, scale) of a matrix of any float dtype: data is float8_e4m3fn, scale float32.

        scale = max |w| of the block / 448        1 where this is 0
        data  = w / scale, limited to +-448 and rounded to nearest, ties to even

    All arithmetic is that of float32. 448 is the largest number of float8_e4m3fn.
    """
    most = torch.finfo(E4M3).max
    (n, k), w = w.shape, w.to(torch.float32)
    rows, columns = (-(-size // side) for size, side in zip((n, k), block, strict=True))
    missing = 0, columns * block[1] - k, 0, rows * block[0] - n
    whole = torch.nn.functional.pad(w.abs(), missing)
    scale = whole.view(rows, block[0], columns, block[1]).amax((1, 3)) / most
    scale = torch.where(scale == 0, 1.0, scale)
    return (w / _for_each(scale, block, (n, k))).clamp(-most, most).to(E4M3), scale


def _for_each(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The scale of each element of a matrix of this shape."""
    for dim, (side, size) in enumerate(zip(block, shape, strict=True)):
        place = torch.arange(size, device=scale.device) // side
        scale = scale.index_select(dim, place)
    return scale


def activation_columns(block: tuple[int, int]) -> int:
    """How many columns of a row of activations share a scale in a product with such a weight."""
    return 128 if block == (128, 128) else 1024


def activations_fp8_ref(v: Tensor, columns: int) -> Tensor:
    """What activations (M, C) become in FP8, in float32.

        scale = max |v| of ``columns`` columns of a row / 448        of 1e-30 at least
        v'    = scale * (v / scale rounded to float8_e4m3fn)

    v / scale is computed as v * (448 / max |v|), which does not overflow the rounding.
    """
    m, c = v.shape
    missing = -c % columns
    whole = torch.nn.functional.pad(v.to(torch.float32), (0, missing)).view(m, -1, columns)
    most, largest = torch.finfo(E4M3).max, whole.abs().amax(2, keepdim=True).clamp(min=1e-30)
    data = (whole * (most / largest)).to(E4M3).to(torch.float32)
    return (data * (largest / most)).view(m, -1)[:, :c]


def lora_linear_fp8_ref(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """`lora_linear_ref` with x in FP8 where W multiplies it: y = x' W^T + bias + s g (x A^T) B^T.

    x' is `activations_fp8_ref` of x (M, K). Its product is of float32, or of float64 where x is.
    In the same way, dx is dy' W + s g (dy B) A. Where each row of W has a scale f, dx has (dy f)'
    data instead of dy' W. ``columns`` of a row share a scale, None is `activation_columns`. The
    gradients of A, B and the gate are those of `lora_linear_ref`.
    """
    dtype = x.dtype
    wide = x.to(torch.promote_types(dtype, torch.float32))
    columns = activation_columns(block) if columns is None else columns
    y = _ProductFp8.apply(wide, data, scale, block, columns).to(dtype)
    s = x @ lora_A.to(dtype).T
    s = s if gate is None else s * gate.to(dtype)
    y = y + scaling * (s @ lora_B.to(dtype).T)
    return y if bias is None else y + bias.to(dtype)


class _ProductFp8(torch.autograd.Function):
    """x' W^T, whose gradient is dy' W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, data: Tensor, scale: Tensor, block: tuple[int, int], columns: int
    ) -> Tensor:
        ctx.weight = data, scale, block, columns
        w = decode_fp8_ref(data, scale, block, x.dtype)
        return activations_fp8_ref(x, columns).to(x.dtype) @ w.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        data, scale, block, columns = ctx.weight
        w = decode_fp8_ref(data, scale, block, dy.dtype)
        if block[0] == 1 and block[1] >= data.shape[1]:
            dy, w = dy * scale.view(-1), data.to(dy.dtype)
        return activations_fp8_ref(dy, columns).to(dy.dtype) @ w, None, None, None, None
