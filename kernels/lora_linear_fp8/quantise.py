"""Activations in FP8 and, from the same read, their low-rank product.

A scale is for STEPS_PER_SCALE steps of 128 columns of a row. A program takes some rows and STEPS
steps. Where a scale is for one step, it reads its activations once. Where a scale is for all of its
steps, it reads them again, mostly from the caches, once it knows the largest one.
"""

import torch
import triton
import triton.language as tl

from ..lora_linear.hopper_config import pitch_of
from ..runtime.cached_launch import launch_cached, specialisation
from ..runtime.tuned import padded_rank

E4M3 = torch.float8_e4m3fn
STEP = 128  # columns that are taken at once, and a stage of the product holds
_LARGEST = tl.constexpr(448.0)  # the largest number of e4m3
_SMALLEST = tl.constexpr(1e-30)  # taken for the largest number of a row, where that is less


@triton.jit
def _load_step(v_ptrs, p_ptrs, offs_k, k, C, mask_m, mask_r, EVEN: tl.constexpr):
    """V and P^T from column ``k`` on, and the mask of V."""
    if EVEN:
        mask_v = mask_m[:, None]
        v = tl.load(v_ptrs, mask=mask_v, other=0.0)
        p = tl.load(p_ptrs, mask=mask_r[None, :], other=0.0)
    else:
        mask_k = offs_k < C - k
        mask_v = mask_m[:, None] & mask_k[None, :]
        v = tl.load(v_ptrs, mask=mask_v, other=0.0)
        p = tl.load(p_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
    return v, p, mask_v


@triton.jit
def _times_factors(v, factor_ptr, offs_k, k, C):
    """V f in float32, from column ``k`` on."""
    wide = v.to(tl.float32)
    if factor_ptr is not None:
        wide *= tl.load(factor_ptr + k + offs_k, mask=offs_k < C - k, other=0.0)[None, :]
    return wide


@triton.jit
def _scale_of(amax):
    """The scale of rows whose largest number is ``amax``, and what divides by it."""
    largest = tl.full(amax.shape, _LARGEST, tl.float32)
    return tl.div_rn(amax, largest), tl.div_rn(largest, amax)


@triton.jit(do_not_specialize=["M", "R", "stride_scale"])
def quantise_kernel(
    v_ptr, p_ptr, factor_ptr, v8_ptr, scale_ptr, part_ptr,
    M, C, R, stride_vm, stride_pc, stride_pr, stride_scale,
    EVEN: tl.constexpr, STEPS: tl.constexpr, STEPS_PER_SCALE: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """V8 sv = V f in e4m3, and the part of S (M, R) = V P^T that some columns make.

    V (M, C); f (C,) are factors of its columns, or none; sv (C / (128 STEPS_PER_SCALE), M) float32;
    the parts (C / (128 STEPS), M, R) float32.
    """
    pid_c = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_k, offs_r = tl.arange(0, BLOCK_SIZE_K), tl.arange(0, RANK)
    mask_m, mask_r = offs_m < M, offs_r < R
    start = pid_c * STEPS * BLOCK_SIZE_K
    end = min(start + STEPS * BLOCK_SIZE_K, C)
    v_ptrs = v_ptr + offs_m[:, None] * stride_vm + (start + offs_k)[None, :]
    v8_ptrs = v8_ptr + offs_m[:, None] * C + (start + offs_k)[None, :]
    p_ptrs = p_ptr + (start + offs_k)[:, None] * stride_pc + offs_r[None, :] * stride_pr
    scale_ptrs = scale_ptr + pid_c * (STEPS // STEPS_PER_SCALE) * stride_scale + offs_m
    acc = tl.zeros((BLOCK_SIZE_M, RANK), tl.float32)
    if STEPS_PER_SCALE == 1:
        for k in tl.range(start, end, BLOCK_SIZE_K, num_stages=1):
            v, p, mask_v = _load_step(v_ptrs, p_ptrs, offs_k, k, C, mask_m, mask_r, EVEN)
            acc = tl.dot(v, p.to(v.dtype), acc)
            wide = _times_factors(v, factor_ptr, offs_k, k, C)
            scale, inverse = _scale_of(tl.maximum(tl.max(tl.abs(wide), 1), _SMALLEST))
            v8 = (wide * inverse[:, None]).to(v8_ptr.dtype.element_ty)
            tl.store(v8_ptrs, v8, mask=mask_v)
            tl.store(scale_ptrs, scale, mask=mask_m)
            v_ptrs += BLOCK_SIZE_K
            v8_ptrs += BLOCK_SIZE_K
            p_ptrs += BLOCK_SIZE_K * stride_pc
            scale_ptrs += stride_scale
    else:
        again_ptrs = v_ptrs
        amax = tl.full((BLOCK_SIZE_M,), _SMALLEST, tl.float32)
        for k in tl.range(start, end, BLOCK_SIZE_K, num_stages=1):
            v, p, mask_v = _load_step(v_ptrs, p_ptrs, offs_k, k, C, mask_m, mask_r, EVEN)
            acc = tl.dot(v, p.to(v.dtype), acc)
            wide = _times_factors(v, factor_ptr, offs_k, k, C)
            amax = tl.maximum(amax, tl.max(tl.abs(wide), 1))
            v_ptrs += BLOCK_SIZE_K
            p_ptrs += BLOCK_SIZE_K * stride_pc
        scale, inverse = _scale_of(amax)
        tl.store(scale_ptrs, scale, mask=mask_m)
        for k in tl.range(start, end, BLOCK_SIZE_K, num_stages=1):
            mask_v = mask_m[:, None]
            if not EVEN:
                mask_v = mask_v & (offs_k < C - k)[None, :]
            v = tl.load(again_ptrs, mask=mask_v, other=0.0)
            wide = _times_factors(v, factor_ptr, offs_k, k, C)
            v8 = (wide * inverse[:, None]).to(v8_ptr.dtype.element_ty)
            tl.store(v8_ptrs, v8, mask=mask_v)
            again_ptrs += BLOCK_SIZE_K
            v8_ptrs += BLOCK_SIZE_K
    part_ptrs = part_ptr + (pid_c * M + offs_m)[:, None] * R + offs_r[None, :]
    tl.store(part_ptrs, acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["scaling", "M", "R", "parts", "pitch"])
def finish_kernel(
    part_ptr, gate_ptr, s_ptr, u_ptr, scaling, M, R, parts, stride_gate, pitch,
    BLOCK_SIZE_M: tl.constexpr, RANK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """S (M, R) = the sum of the parts, float32; U (M, pitch) = s g S, 0 beyond R."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M)
    offs_r, part = tl.arange(0, RANK), tl.arange(0, PARTS)
    mask_m, mask_r = (offs_m < M)[:, None], offs_r < R
    offs = offs_m[:, None] * R + offs_r[None, :]
    mask = mask_m & mask_r[None, :]
    part_ptrs = part_ptr + part.to(tl.int64)[:, None, None] * M * R + offs[None, :, :]
    values = tl.load(part_ptrs, mask=(part < parts)[:, None, None] & mask[None, :, :], other=0.0)
    acc = tl.sum(values, 0)
    tl.store(s_ptr + offs, acc, mask=mask)
    acc *= tl.cast(scaling, tl.float32)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offs_r * stride_gate, mask=mask_r, other=0.0)
        acc *= gate.to(tl.float32)[None, :]
    u = tl.where(mask_r[None, :], acc, 0.0).to(u_ptr.dtype.element_ty)
    u_ptrs = u_ptr + offs_m[:, None] * pitch + offs_r[None, :]
    tl.store(u_ptrs, u, mask=mask_m & (offs_r < pitch)[None, :])


def quantised(v, p, scaling, gate, factors, steps_per_scale):
    """(V8, sv, S, U): V f = V8 sv, S = V P^T (M, r) float32, U = s g S (M, r rounded up to 8).

    V (M, C), P (r, C); f (C,) are factors of the columns of V; sv (C / columns of a scale, M).
    """
    (m, c), r = v.shape, p.shape[0]
    v = v if v.stride(1) == 1 else v.contiguous()
    # Measured on an H200, with rank 16.
    block_m, warps = (64, 4) if steps_per_scale == 1 else (64, 8)
    steps = max(4, steps_per_scale)
    parts, rank, pitch = triton.cdiv(c, STEP * steps), padded_rank(r), pitch_of(r)
    v8 = v.new_empty((m, c), dtype=E4M3)
    scales = v.new_empty((triton.cdiv(c, STEP * steps_per_scale), m), dtype=torch.float32)
    part = v.new_empty((parts, m, r), dtype=torch.float32)
    s, u = v.new_empty((m, r), dtype=torch.float32), v.new_empty((m, pitch))
    strides = v.stride(0), p.stride(1), p.stride(0)
    even = c % STEP == 0
    key = (
        *specialisation(v, p, c, *strides), factors is not None and specialisation(factors),
        even, steps, steps_per_scale, rank,
    )  # fmt: skip
    launch_cached(
        quantise_kernel, (triton.cdiv(m, block_m), parts), key,
        v, p, factors, v8, scales, part, m, c, r, *strides, m,
        even, steps, steps_per_scale, block_m, STEP, rank, num_warps=warps,
    )  # fmt: skip
    padded_parts = triton.next_power_of_2(parts)
    rows = max(1, 2048 // (rank * padded_parts))
    stride_gate = gate.stride(0) if gate is not None and gate.numel() > 1 else 0
    gate_key = () if gate is None else specialisation(gate, stride_gate)
    launch_cached(
        finish_kernel, (triton.cdiv(m, rows),), (u.dtype, gate_key, rank, padded_parts),
        part, gate, s, u, float(scaling), m, r, parts, stride_gate, pitch,
        rows, rank, padded_parts, num_warps=4,
    )  # fmt: skip
    return v8, scales, s, u
