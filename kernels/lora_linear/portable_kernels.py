"""The portable kernels of `lora_linear`; `portable.py` has the formulas and launches them."""

import triton
import triton.language as tl

from ..runtime.philox import kept_by_dropout
from .tiles import add_branch, add_dot, add_product, scaled_rank_tile


@triton.jit(do_not_specialize=["M"])
def _lora_linear_down_kernel(
    v_ptr, p_ptr, u_ptr, seed_ptr,
    dropout, M, K, R,
    stride_vm, stride_vk, stride_pr, stride_pk,
    K_PER_SPLIT, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """U (split, M, R) float32: U[i] = V P^T over the i-th part of K.

    If there is a seed, dropout is applied to V.
    """
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, k0 = pid_m.to(tl.int64) * BLOCK_SIZE_M, split.to(tl.int64) * K_PER_SPLIT
    r0 = pid_r.to(tl.int64) * BLOCK_SIZE_R
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_r = tl.arange(0, BLOCK_SIZE_R).to(INDEX)
    mask_m, mask_r = offs_m < M - m0, offs_r < R - r0
    acc = add_product(
        tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_R), tl.float32),
        v_ptr + m0 * stride_vm, p_ptr + r0 * stride_pr, stride_vm, stride_vk, stride_pr, stride_pk,
        offs_m, offs_r, mask_m, mask_r, k0, tl.minimum(K, k0 + K_PER_SPLIT), M, K,
        seed_ptr, dropout, m0 + offs_m, EVEN_K, PRECISION, INDEX, BLOCK_SIZE_K,
    )  # fmt: skip
    u_ptr += (split.to(tl.int64) * M + m0) * R + r0
    u_offs = offs_m[:, None] * R + offs_r[None, :]
    tl.store(u_ptr + u_offs, acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def _lora_linear_fwd_kernel(
    v_ptr, q_ptr, p_ptr, u_ptr, gate_ptr, bias_ptr, y_ptr, seed_ptr,
    scaling, dropout, M, N, K, R,
    stride_vm, stride_vk, stride_qn, stride_qk, stride_pn, stride_pr, stride_gate, stride_bias,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = V Q^T + bias + m * ((s g U) P^T), with U (M, R) float32.

    m is dropout's mask if there is a seed, else 1.
    """
    # Tiles are ordered in groups of rows, so that those that run together share operands in L2.
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_SIZE_M), tl.cdiv(N, BLOCK_SIZE_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_SIZE_M * blocks_n)
    first_m = group * GROUP_SIZE_M
    rows = tl.minimum(blocks_m - first_m, GROUP_SIZE_M)
    pid_m = first_m + pid % (GROUP_SIZE_M * blocks_n) % rows
    pid_n = pid % (GROUP_SIZE_M * blocks_n) // rows

    m0, n0 = pid_m.to(tl.int64) * BLOCK_SIZE_M, pid_n.to(tl.int64) * BLOCK_SIZE_N
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_n = tl.arange(0, BLOCK_SIZE_N).to(INDEX)
    mask_m, mask_n = offs_m < M - m0, offs_n < N - n0
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    u_ptr += m0 * R
    p_ptr += n0 * stride_pn
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    if seed_ptr is not None:  # the mask is for the low-rank term alone, so that term comes first
        acc = add_branch(
            acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, M, R,
            stride_pn, stride_pr, dtype, PRECISION, INDEX, BLOCK_SIZE_R,
        )  # fmt: skip
        keep = kept_by_dropout(
            tl.load(seed_ptr), dropout, m0 + offs_m, n0, N, BLOCK_SIZE_N
        )  # fmt: skip
        acc = tl.where(keep, acc, 0.0)
    acc = add_product(
        acc,
        v_ptr + m0 * stride_vm, q_ptr + n0 * stride_qn, stride_vm, stride_vk, stride_qn, stride_qk,
        offs_m, offs_n, mask_m, mask_n, tl.cast(0, tl.int64), K, M, K,
        None, None, None, EVEN_K, PRECISION, INDEX, BLOCK_SIZE_K,
    )  # fmt: skip
    if seed_ptr is None:
        acc = add_branch(
            acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, M, R,
            stride_pn, stride_pr, dtype, PRECISION, INDEX, BLOCK_SIZE_R,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (n0 + offs_n) * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptr += m0 * N + n0
    y_offs = offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + y_offs, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "M_PER_SPLIT"])
def _lora_linear_wgrad_kernel(
    u_ptr, v_ptr, gate_ptr, dp_ptr, seed_ptr,
    scaling, dropout, M, C, R, M_PER_SPLIT,
    stride_vm, stride_vc, stride_gate, stride_dpc, stride_dpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """dP (split, R, C): dP[i] = (s g U)^T V over the i-th part of the tokens.

    The strides decide whether dP is stored as (R, C) or as (C, R). If there is a seed, dropout is
    applied to V.
    """
    pid_c, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    c0, start = pid_c.to(tl.int64) * BLOCK_SIZE_C, split.to(tl.int64) * M_PER_SPLIT
    end = tl.minimum(start + M_PER_SPLIT, M)
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_c = tl.arange(0, BLOCK_SIZE_C).to(INDEX)
    offs_r = pid_r * BLOCK_SIZE_R + tl.arange(0, BLOCK_SIZE_R).to(INDEX)
    mask_c = offs_c < C - c0
    v_offs = offs_m[:, None] * stride_vm + offs_c[None, :] * stride_vc
    v_ptr += start * stride_vm + c0 * stride_vc
    u_ptr += start * R
    seed = None if seed_ptr is None else tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), tl.float32)
    for m in range(start, end, BLOCK_SIZE_M):
        mask_m = offs_m < end - m
        v = tl.load(v_ptr + v_offs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        if seed is not None:
            keep = kept_by_dropout(seed, dropout, m + offs_m, c0, C, BLOCK_SIZE_C)
            v = tl.where(keep, v, 0.0)
        u = scaled_rank_tile(
            u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, v.dtype
        )  # fmt: skip
        acc = add_dot(acc, tl.trans(v), u, M, PRECISION)
        v_ptr += BLOCK_SIZE_M * stride_vm
        u_ptr += BLOCK_SIZE_M * R
    dp_ptr += split.to(tl.int64) * C * R + c0 * stride_dpc
    dp_offs = offs_c[:, None] * stride_dpc + offs_r[None, :] * stride_dpr
    mask = mask_c[:, None] & (offs_r < R)[None, :]
    tl.store(dp_ptr + dp_offs, acc.to(dp_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(parts_ptr, out_ptr, splits, numel, BLOCK_SIZE: tl.constexpr):
    """out = the sum of the parts, of ``numel`` elements each."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < numel
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    part_ptrs = parts_ptr + offs
    for _ in range(splits):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)
