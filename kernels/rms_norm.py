"""RMSNorm: y = x / rms(x) * (offset + weight), the same again from its 1 / rms, and dx.

A program takes a row. Models round in two ways: Llama rounds x / rms(x) to the dtype of x before it
multiplies that by the weight, and Gemma rounds once, at the end.
"""

import torch
import triton
import triton.language as tl

from .runtime.cached_launch import launch_cached, specialisation
from .runtime.gpu import on_device

LARGEST_WIDTH = 65536  # columns, which a program holds in its registers


@triton.jit
def _scaled(x, rstd, w, offset, dtype: tl.constexpr, ROUNDS_TWICE: tl.constexpr):
    """(x rstd) (offset + w), in float32."""
    normed = x * rstd
    factor = offset + w
    if ROUNDS_TWICE:
        normed = normed.to(dtype).to(tl.float32)
        factor = factor.to(dtype).to(tl.float32)
    return normed * factor


@triton.jit(do_not_specialize=["eps", "offset"])
def _rms_norm_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, K, stride_x, eps, offset,
    MEASURES: tl.constexpr, ROUNDS_TWICE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One row of y. ``rstd`` is measured and written, or else read."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < K
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if MEASURES:
        rstd = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
        tl.store(rstd_ptr + row, rstd)
    else:
        rstd = tl.load(rstd_ptr + row)
    y = _scaled(x, rstd, w, offset, dtype, ROUNDS_TWICE)
    tl.store(y_ptr + row * K + offs, y.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["offset"])
def _rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, dx_ptr, K, stride_x, offset, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """One row of dx = rstd (dy w - x rstd^2 mean(dy w x))."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_SIZE)
    mask = offs < K
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * K + offs, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    dn = dy * (offset + w)
    normed = x * rstd
    dx = rstd * (dn - normed * (tl.sum(dn * normed, 0) / K))
    tl.store(dx_ptr + row * K + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def rms_norm(x, weight, eps: float, offset: float, rounds_twice: bool):
    """(y, rstd) for x (M, K) whose rows are contiguous: y in the dtype of x, rstd (M,) float32."""
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return _launch(x, weight, rstd, eps, offset, rounds_twice, measures=True), rstd


def rms_norm_again(x, weight, rstd, offset: float, rounds_twice: bool):
    """y of `rms_norm`, bit by bit, from what it gave as ``rstd``."""
    return _launch(x, weight, rstd, 0.0, offset, rounds_twice, measures=False)


def rms_norm_bwd(dy, x, weight, rstd, offset: float):
    """dx of `rms_norm`; dy (M, K) contiguous."""
    m, k = x.shape
    dx = torch.empty((m, k), dtype=x.dtype, device=x.device)
    args = dy, x, weight, rstd, dx, k, x.stride(0)
    block = triton.next_power_of_2(k)
    if m:
        with on_device(x.device):
            launch_cached(
                _rms_norm_bwd_kernel, (m,), (block, *specialisation(*args)),
                *args, float(offset), block, num_warps=_num_warps(block),
            )  # fmt: skip
    return dx


def _launch(x, weight, rstd, eps, offset, rounds_twice, measures):
    m, k = x.shape
    y = torch.empty((m, k), dtype=x.dtype, device=x.device)
    args = x, weight, y, rstd, k, x.stride(0)
    block = triton.next_power_of_2(k)
    if m:
        with on_device(x.device):
            launch_cached(
                _rms_norm_kernel, (m,), (block, measures, rounds_twice, *specialisation(*args)),
                *args, float(eps), float(offset), measures, rounds_twice, block,
                num_warps=_num_warps(block),
            )  # fmt: skip
    return y


def _num_warps(block: int) -> int:
    return min(16, max(4, block // 512))
