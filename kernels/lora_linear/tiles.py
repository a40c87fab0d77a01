"""What a program of `lora_linear` computes on its tile: products, and the low-rank term.

V, Q, P, U, s and g are those of `portable.py`.
"""

import triton
import triton.language as tl

from ..runtime.philox import kept_by_dropout


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
    """s g U for a tile of rows and ranks, rounded once, to the dtype of the product.

    It is 0 beyond M and R, also where g is infinite.
    """
    mask_r = offs_r < R
    mask = mask_m[:, None] & mask_r[None, :]
    u = tl.load(u_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
    factor = tl.full(offs_r.shape, 1.0, tl.float32) * tl.cast(scaling, tl.float32)
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + offs_r * stride_gate, mask=mask_r, other=0.0).to(tl.float32)
    return tl.where(mask, u * factor[None, :], 0.0).to(dtype)


@triton.jit
def add_dot(acc, a, b, M, PRECISION: tl.constexpr):
    """acc + a b; a product of float32 numbers is summed by itself and then added to acc.

    The error of a sum grows with its length, and nothing else rounds such a product. Triton would
    go on from acc all the same if it knew that the sum starts at 0, so the 0 comes from M > 0.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        zero = tl.full(acc.shape, 0.0, tl.float32) + tl.minimum(M, 0).to(tl.float32)
        acc += tl.dot(a, b, zero, input_precision=PRECISION)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_product(
    acc, v_ptr, q_ptr, stride_vm, stride_vk, stride_qn, stride_qk, offs_m, offs_n, mask_m, mask_n,
    start, end, M, K, seed_ptr, dropout, rows,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """acc + V Q^T over columns start to end; the pointers point to column 0 of the tile's rows.

    If there is a seed, dropout is applied to V; ``rows`` (int64) are the numbers of its rows.
    """
    offs_k = tl.arange(0, BLOCK_SIZE_K).to(INDEX)
    v_offs = offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk
    q_offs = offs_n[None, :] * stride_qn + offs_k[:, None] * stride_qk
    seed = None if seed_ptr is None else tl.load(seed_ptr)
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
        acc = add_dot(acc, v, q.to(v.dtype), M, PRECISION)
        v_ptr += BLOCK_SIZE_K * stride_vk
        q_ptr += BLOCK_SIZE_K * stride_qk
    return acc


@triton.jit
def add_branch(
    acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, M, R,
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
        acc = add_dot(acc, u, p.to(dtype), M, PRECISION)
    return acc
