"""What a program of `lora_linear` computes on its tile: products, and the low-rank term.

V, Q, P, U, s and g are those of `portable.py`.
"""

import triton
import triton.language as tl

from ..runtime.philox import kept_by_dropout

SECTION = tl.constexpr(256)  # columns that a float32 product sums at a time


def index_type(r: int, *tensors):
    """The type of offsets within a tile: 32 bits if they suffice for these strides.

    Larger offsets are added to pointers, in 64 bits.
    """
    largest = max(stride for t in tensors for stride in t.stride())
    return tl.int32 if largest * (256 + r) < 2**31 else tl.int64


@triton.jit
def scaled_rank_tile(
    u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, dtype: tl.constexpr
):  # fmt: skip
    """s g U for a tile of rows and ranks, rounded once, to the dtype of the product."""
    mask_r = offs_r < R
    u = tl.load(
        u_ptr + offs_m[:, None] * R + offs_r[None, :],
        mask=mask_m[:, None] & mask_r[None, :],
        other=0.0,
    )
    factor = tl.full(offs_r.shape, 1.0, tl.float32) * tl.cast(scaling, tl.float32)
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + offs_r * stride_gate, mask=mask_r, other=0.0).to(tl.float32)
    return (u * factor[None, :]).to(dtype)


@triton.jit
def _add_section(
    acc, v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k, start, end, K, stride_vk, stride_qk,
    seed, dropout, rows,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """acc + V Q^T over columns start to end; the pointers point to column 0 of the tile's rows.

    If ``seed`` is not None, dropout is applied to V; ``rows`` (int64) are the numbers of its rows.
    """
    v_ptr += start * stride_vk
    q_ptr += start * stride_qk
    for k in range(start, end, BLOCK_SIZE_K):
        if EVEN_K:
            v = tl.load(v_ptr + v_offs, mask=mask_m[:, None], other=0.0)
            q = tl.load(q_ptr + q_offs, mask=mask_n[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            v = tl.load(v_ptr + v_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            q = tl.load(q_ptr + q_offs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        if seed is not None:
            keep = kept_by_dropout(seed, dropout, rows, k, K, BLOCK_SIZE_K)
            v = tl.where(keep, v, 0.0)
        acc = tl.dot(v, q.to(v.dtype), acc, input_precision=PRECISION)
        v_ptr += BLOCK_SIZE_K * stride_vk
        q_ptr += BLOCK_SIZE_K * stride_qk
    return acc


@triton.jit
def add_product(
    acc, v_ptr, q_ptr, stride_vm, stride_vk, stride_qn, stride_qk, offs_m, offs_n, mask_m, mask_n,
    start, end, K, seed_ptr, dropout, rows,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """acc + V Q^T over columns start to end, float32; with dropout of V as in `_add_section`.

    Products of float32 operands are summed in sections, and the sections are added up. The error of
    a sum grows with its length, and nothing else rounds here.
    """
    offs_k = tl.arange(0, BLOCK_SIZE_K).to(INDEX)
    v_offs = offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk
    q_offs = offs_n[None, :] * stride_qn + offs_k[:, None] * stride_qk
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    if v_ptr.dtype.element_ty == tl.float32:
        for first in range(start, end, SECTION):
            acc += _add_section(
                tl.zeros_like(acc), v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k,
                first, tl.minimum(first + SECTION, end), K, stride_vk, stride_qk,
                seed, dropout, rows, EVEN_K, PRECISION, BLOCK_SIZE_K,
            )  # fmt: skip
    else:
        acc = _add_section(
            acc, v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k,
            start, end, K, stride_vk, stride_qk,
            seed, dropout, rows, EVEN_K, PRECISION, BLOCK_SIZE_K,
        )  # fmt: skip
    return acc


@triton.jit
def add_branch(
    acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, R,
    stride_pn, stride_pr,
    dtype: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """acc + (s g U) P^T; the pointers point to the tile's first row and column."""
    # This loop has few steps. Pipelining it would only take shared memory from the big product.
    for r in tl.range(0, R, BLOCK_SIZE_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_SIZE_R).to(INDEX)
        u = scaled_rank_tile(
            u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, dtype
        )  # fmt: skip
        p_offs = offs_n[None, :] * stride_pn + offs_r[:, None] * stride_pr
        p = tl.load(p_ptr + p_offs, mask=mask_n[None, :] & (offs_r < R)[:, None], other=0.0)
        acc = tl.dot(u, p.to(dtype), acc, input_precision=PRECISION)
    return acc
