"""`rms_norm`: RMSNorm that keeps its input and one number a row, and tells what it was made of."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from .dispatch import choose_path
from .reference_blocks import rms_norm_again_ref, rms_norm_ref
from .remade import tell_remade
from .transforms import wants_reference

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels import rms_norm as kernels


def _by_triton(x: Tensor) -> bool:
    fits = x.shape[1] and choose_path(x.device, x.dtype).backend == "triton"
    return bool(fits) and x.shape[1] <= kernels.LARGEST_WIDTH


def _forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_twice: bool
) -> tuple[Tensor, Tensor]:
    run = kernels.rms_norm if _by_triton(x) else rms_norm_ref
    return run(x, weight, eps, offset, rounds_twice)


def _backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    if _by_triton(x):
        return kernels.rms_norm_bwd(dy.contiguous(), x, weight, rstd, offset)
    wide = wide_dtype(x.dtype)
    dn = dy.to(wide) * (weight.to(wide) + offset)
    normed = x.to(wide) * rstd[:, None]
    dx = rstd[:, None] * (dn - normed * (dn * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds_twice: bool
    ) -> tuple[Tensor, Tensor]:
        y, rstd = _forward(x, weight, eps, offset, rounds_twice)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.settings = eps, offset, rounds_twice
        return y, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if wants_reference(dy):
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                leaf = x.view_as(x)
                y, _ = rms_norm_ref(leaf, weight, *ctx.settings)
            (dx,) = torch.autograd.grad(y, leaf, dy, create_graph=create_graph)
        else:
            dx = _backward(dy, x, weight, rstd, ctx.settings[1])
        return dx, None, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, rounds_twice: bool = True
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), differentiable in x.

    A `lora_linear` that reads y keeps x and 1 / rms, which are kept here anyway, and makes y again
    in its backward pass. Where only the reference is there, as for float64, all is PyTorch's own.

    Args:
        x: (..., K); its dtype is that of ``weight``.
        weight: (K,), a constant: no gradient is computed for it.
        offset: what is added to the weight: 1 for Gemma.
        rounds_twice: see `reference_blocks.rms_norm_ref`.
    """
    if choose_path(x.device, x.dtype).backend == "reference":
        return rms_norm_ref(x, weight.detach(), eps, offset, rounds_twice)[0]
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    weight = weight.detach()
    y, rstd = _RmsNorm.apply(rows, weight, eps, offset, rounds_twice)
    y = y.view(x.shape)

    def make(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return rms_norm_ref(x, weight, eps, offset, rounds_twice)[0]
        run = kernels.rms_norm_again if _by_triton(x) else rms_norm_again_ref
        return run(x, weight, rstd, offset, rounds_twice)

    tell_remade(y, (rows, weight, rstd), make)
    return y
