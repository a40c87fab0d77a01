"""The product inside of a gated MLP, h = act(e) * g, and its gradients, each in one pass.

The backward pass can also give dA of the layer behind, dA = V^T h, which is all that reads h there:
then h is never written a second time. V = s g dY B of that layer is (M, R).
"""

import torch
import triton
import triton.language as tl

from .runtime.cached_launch import launch_cached, specialisation
from .runtime.gpu import on_device

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")  # the kernels take their places in this tuple

BLOCK_SIZE = 2048  # entries of a row that a program takes

# A program of the pass with dA takes so many columns, and so many rows at a time.
COLUMNS, ROWS = 128, 32
ROWS_PER_SPLIT = 512
LARGEST_RANK = 64  # with dA; above it, cuBLAS is good at that product


@triton.jit
def _activate(e, ACTIVATION: tl.constexpr):
    """act(e) and its derivative, float32."""
    if ACTIVATION == 0:
        s = 1.0 / (1.0 + tl.exp(-e))
        f = e * s
        df = s * (1.0 + e * (1.0 - s))
    elif ACTIVATION == 1:
        c = 0.7978845608028654  # sqrt(2 / pi)
        u = c * (e + 0.044715 * e * e * e)
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u))  # tanh(u); right where exp is infinite too
        f = 0.5 * e * (1.0 + t)
        df = 0.5 * (1.0 + t) + 0.5 * e * (1.0 - t * t) * c * (1.0 + 3 * 0.044715 * e * e)
    else:
        p = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        f = e * p
        df = p + e * tl.exp(-0.5 * e * e) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return f, df


@triton.jit
def _load_row(ptr, start, offs, mask):
    """Entries of a row, float32; ``start`` is where the row begins."""
    return tl.load(ptr + start + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gated_product_kernel(
    e_ptr, g_ptr, h_ptr, N, stride_e, stride_g, ACTIVATION: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < N
    e = _load_row(e_ptr, row * stride_e, offs, mask)
    g = _load_row(g_ptr, row * stride_g, offs, mask)
    f, _ = _activate(e, ACTIVATION)
    tl.store(h_ptr + row * N + offs, (f * g).to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_product_bwd_kernel(
    e_ptr, g_ptr, dh_ptr, de_ptr, dg_ptr, N, stride_e, stride_g, stride_de, stride_dg,
    ACTIVATION: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < N
    e = _load_row(e_ptr, row * stride_e, offs, mask)
    g = _load_row(g_ptr, row * stride_g, offs, mask)
    dh = _load_row(dh_ptr, row * N, offs, mask)
    f, df = _activate(e, ACTIVATION)
    dtype = de_ptr.dtype.element_ty
    tl.store(de_ptr + row * stride_de + offs, (dh * g * df).to(dtype), mask=mask)
    tl.store(dg_ptr + row * stride_dg + offs, (dh * f).to(dtype), mask=mask)


@triton.jit
def _gated_product_bwd_and_da_kernel(
    e_ptr, g_ptr, dh_ptr, de_ptr, dg_ptr, v_ptr, part_ptr, M, N, R,
    stride_e, stride_g, stride_de, stride_dg, stride_v, rows_per_split,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same, and the part (R, N) of dA = V^T h that the rows of a split sum up to."""
    dtype: tl.constexpr = de_ptr.dtype.element_ty
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    offs_r = tl.arange(0, RANK)
    mask_n = offs_n < N
    acc = tl.zeros([RANK, COLUMNS], tl.float32)
    first = split * rows_per_split
    for m in range(first, min(first + rows_per_split, M), ROWS):
        offs_m = (m + tl.arange(0, ROWS)).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        e = tl.load(e_ptr + offs_m[:, None] * stride_e + offs_n[None, :], mask=mask, other=0.0)
        g = tl.load(g_ptr + offs_m[:, None] * stride_g + offs_n[None, :], mask=mask, other=0.0)
        dh = tl.load(dh_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
        v = tl.load(
            v_ptr + offs_m[None, :] * stride_v + offs_r[:, None],
            mask=mask_m[None, :] & (offs_r < R)[:, None], other=0.0,
        )  # fmt: skip
        g, dh = g.to(tl.float32), dh.to(tl.float32)
        f, df = _activate(e.to(tl.float32), ACTIVATION)
        de_ptrs = de_ptr + offs_m[:, None] * stride_de + offs_n[None, :]
        dg_ptrs = dg_ptr + offs_m[:, None] * stride_dg + offs_n[None, :]
        tl.store(de_ptrs, (dh * g * df).to(dtype), mask=mask)
        tl.store(dg_ptrs, (dh * f).to(dtype), mask=mask)
        h = (f * g).to(dtype)  # as the forward pass rounded it
        acc = tl.dot(v, h, acc, input_precision=PRECISION)
    part_ptr += split.to(tl.int64) * R * N
    part = part_ptr + offs_r.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(part, acc, mask=(offs_r < R)[:, None] & mask_n[None, :])


def gated_product(e, g, activation: str):
    """h (M, N) = act(e) * g, in the dtype of e. Rows of e and g are contiguous."""
    m, n = e.shape
    h = torch.empty((m, n), dtype=e.dtype, device=e.device)
    if h.numel():
        args = e, g, h, n, e.stride(0), g.stride(0)
        with on_device(e.device):
            launch_cached(
                _gated_product_kernel, (m, triton.cdiv(n, BLOCK_SIZE)),
                (activation, *specialisation(*args)),
                *args, ACTIVATIONS.index(activation), BLOCK_SIZE, num_warps=8,
            )  # fmt: skip
    return h


def gated_product_bwd(e, g, dh, activation: str, de, dg) -> None:
    """Write the gradients of `gated_product` into ``de`` and ``dg``, which may be e, g and dh."""
    m, n = e.shape
    if dh.numel():
        args = e, g, dh, de, dg, n, *(t.stride(0) for t in (e, g, de, dg))
        with on_device(e.device):
            launch_cached(
                _gated_product_bwd_kernel, (m, triton.cdiv(n, BLOCK_SIZE)),
                (activation, *specialisation(*args)),
                *args, ACTIVATIONS.index(activation), BLOCK_SIZE, num_warps=8,
            )  # fmt: skip


def gated_product_bwd_and_da(e, g, dh, v, r: int, activation: str, de, dg):
    """`gated_product_bwd`, and dA (r, N) = V^T h in float32; V (M, r or more columns)."""
    m, n = e.shape
    splits = max(1, triton.cdiv(m, ROWS_PER_SPLIT))
    parts = torch.empty((splits, r, n), dtype=torch.float32, device=e.device)
    precision = "ieee" if e.dtype == torch.float32 else "tf32"
    strides = (t.stride(0) for t in (e, g, de, dg, v))
    args = e, g, dh, de, dg, v, parts, m, n, r, *strides, ROWS_PER_SPLIT
    with on_device(e.device):
        launch_cached(
            _gated_product_bwd_and_da_kernel, (triton.cdiv(n, COLUMNS), splits),
            (activation, r, *specialisation(*args)),
            *args, ACTIVATIONS.index(activation), precision,
            max(16, triton.next_power_of_2(r)), ROWS, COLUMNS, num_warps=4,
        )  # fmt: skip
    return parts[0] if splits == 1 else parts.sum(0)
