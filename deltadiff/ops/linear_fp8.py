"""`linear_fp8`: a linear layer over a frozen weight in FP8, which each pass decodes again."""

from typing import Any

import torch
from torch import Tensor, nn

from .decode_fp8 import Float8, decoded_fp8
from .dispatch import choose_decoder
from .lora_linear import autocast_dtype
from .transforms import transformed

_LIBRARY = torch.library.Library("deltadiff", "FRAGMENT")  # lives as long as this module
_LIBRARY.define(
    "decode_fp8(Tensor data, Tensor scale, int block_rows, int block_columns, ScalarType dtype, "
    "str backend) -> Tensor"
)


@torch.library.impl(_LIBRARY, "decode_fp8", "CompositeExplicitAutograd")
def _decode(data: Tensor, scale: Tensor, rows: int, columns: int, *how: Any) -> Tensor:
    return decoded_fp8(Float8(data, scale, (rows, columns)), *how)


@torch.library.register_fake("deltadiff::decode_fp8", lib=_LIBRARY)
def _decoded_shape(data: Tensor, *args: Any) -> Tensor:
    return data.new_empty(data.shape, dtype=args[-2])


class _LinearFp8(torch.autograd.Function):
    """y = x W^T + bias. The weight is handed in as its `parts`, for torch.compile to follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, backend: str, *parts: Any) -> Tensor:
        ctx.parts, ctx.backend = parts, backend
        weight = torch.ops.deltadiff.decode_fp8(*parts, x.dtype, backend)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ torch.ops.deltadiff.decode_fp8(*ctx.parts, dy.dtype, ctx.backend)
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.float32).to(dy.dtype)
        return dx, dbias, *[None] * (1 + len(ctx.parts))


def linear_fp8(x: Tensor, weight: Float8, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, with gradients of x and bias; W is decoded in the dtype of x.

    Nothing of the size of W is kept for the backward pass. Under autocast, all is in its dtype.

    Args:
        x: (..., K) float32, bfloat16, float16 or float64.
        weight: (N, K), on the device of x.
        bias: (N,) of any such dtype.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ArgumentTypeError: the dtype of x is none of these.
    """
    compute = autocast_dtype(x)
    x = x if compute is None else x.to(compute)
    bias = None if bias is None else bias.to(x.dtype)
    if not torch.compiler.is_compiling() and transformed():  # which cannot follow `_LinearFp8`
        return nn.functional.linear(x, decoded_fp8(weight, x.dtype, "reference"), bias)
    return _LinearFp8.apply(x, bias, _decoder(weight.device, x.dtype), *weight.parts)


@torch.compiler.assume_constant_result
def _decoder(device: torch.device, dtype: torch.dtype) -> str:
    return choose_decoder(device, dtype, None)
