"""`lora_linear` for few tokens, where most of the time goes into reading W.

    Y = V Q^T + bias + s g U P^T,    U = V D^T        (Q = W, D = A, P = B; or their transposes)

Each program multiplies its rows by D itself, beside its columns of Q: this saves a launch and the
wait for it. K is split into parts so that the whole GPU reads; since everything is linear in V,
each part adds its own low-rank term. The parts are added in a fixed order.
"""

import torch
import triton
import triton.language as tl

from ..runtime.gpu import on_device, shared_kib
from ..runtime.tuned import LaunchConfig, combinations
from .portable import adapter_gradients, new_kept, rank_part
from .portable_config import PROGRAMS
from .tiles import index_type


@triton.jit(do_not_specialize=["M"])  # Triton does specialise on K_PER_SPLIT % 16 == 0
def _lora_linear_few_kernel(
    v_ptr, q_ptr, d_ptr, p_ptr, gate_ptr, bias_ptr, y_ptr, u_ptr,
    scaling, M, N, K, R, K_PER_SPLIT,
    stride_vm, stride_vk, stride_qn, stride_qk, stride_dr, stride_dk, stride_pn, stride_pr,
    stride_gate, stride_bias,
    EVEN_K: tl.constexpr, INDEX: tl.constexpr, BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Y (split, M, N) and U (split, M, R) float32: what each part of K contributes."""
    pid_n, pid_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, n0 = pid_m.to(tl.int64) * BLOCK_SIZE_M, pid_n.to(tl.int64) * BLOCK_SIZE_N
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_n = tl.arange(0, BLOCK_SIZE_N).to(INDEX)
    offs_k = tl.arange(0, BLOCK_SIZE_K).to(INDEX)
    offs_r = tl.arange(0, RANK).to(INDEX)
    mask_m, mask_n, mask_r = offs_m < M - m0, offs_n < N - n0, offs_r < R
    start = split.to(tl.int64) * K_PER_SPLIT
    v_ptr += m0 * stride_vm + start * stride_vk
    q_ptr += n0 * stride_qn + start * stride_qk
    d_ptr += start * stride_dk
    v_offs = offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk
    q_offs = offs_n[None, :] * stride_qn + offs_k[:, None] * stride_qk
    d_offs = offs_r[None, :] * stride_dr + offs_k[:, None] * stride_dk
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    u = tl.zeros((BLOCK_SIZE_M, RANK), tl.float32)
    for k in range(start, tl.minimum(start + K_PER_SPLIT, K), BLOCK_SIZE_K):
        if EVEN_K:
            v = tl.load(v_ptr + v_offs, mask=mask_m[:, None], other=0.0)
            q = tl.load(q_ptr + q_offs, mask=mask_n[None, :], other=0.0)
            d = tl.load(d_ptr + d_offs, mask=mask_r[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            v = tl.load(v_ptr + v_offs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            q = tl.load(q_ptr + q_offs, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            d = tl.load(d_ptr + d_offs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        acc = tl.dot(v, q, acc)
        u = tl.dot(v, d, u)
        v_ptr += BLOCK_SIZE_K * stride_vk
        q_ptr += BLOCK_SIZE_K * stride_qk
        d_ptr += BLOCK_SIZE_K * stride_dk

    rows = split.to(tl.int64) * M + m0 + offs_m
    if pid_n == 0:
        u_ptrs = u_ptr + rows[:, None] * R + offs_r[None, :]
        tl.store(u_ptrs, u, mask=mask_m[:, None] & mask_r[None, :])
    factor = tl.full((RANK,), 1.0, tl.float32) * tl.cast(scaling, tl.float32)
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + offs_r * stride_gate, mask=mask_r, other=0.0).to(tl.float32)
    p_ptrs = p_ptr + n0 * stride_pn + offs_n[None, :] * stride_pn + offs_r[:, None] * stride_pr
    p = tl.load(p_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    acc = tl.dot((u * factor[None, :]).to(dtype), p.to(dtype), acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (n0 + offs_n) * stride_bias, mask=mask_n, other=0.0)
        acc += tl.where(split == 0, bias.to(tl.float32), 0.0)[None, :]
    y_ptrs = y_ptr + rows[:, None] * N + (n0 + offs_n)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["splits", "y_numel", "u_numel", "y_blocks"])
def _few_sum_kernel(
    y_parts_ptr, y_ptr, y_numel, u_parts_ptr, u_ptr, u_numel, splits, y_blocks,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of Y in the first ``y_blocks`` programs, those of U in the others."""
    pid = tl.program_id(0)
    if pid < y_blocks:
        offs = pid.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        total = tl.zeros((BLOCK_SIZE,), tl.float32)
        for i in range(splits):
            total += tl.load(y_parts_ptr + i * y_numel + offs, mask=offs < y_numel, other=0.0)
        tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=offs < y_numel)
    else:
        offs = (pid - y_blocks).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        total = tl.zeros((BLOCK_SIZE,), tl.float32)
        for i in range(splits):
            total += tl.load(u_parts_ptr + i * u_numel + offs, mask=offs < u_numel, other=0.0)
        tl.store(u_ptr + offs, total, mask=offs < u_numel)


# --------------------------------------------------------------- launch configuration


def few_config(M: int, N: int, K: int, R: int, shared: int) -> dict:
    """Blocks, warps, stages and the number of parts that K is split into.

    ``shared`` is the KiB of shared memory that a block can have.
    """
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64
    block_n = 64 if M <= 64 else 128
    rank = max(16, triton.next_power_of_2(R))
    block_k = 128 if block_m == 16 and rank <= 32 else 64
    programs = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_N=block_n, BLOCK_SIZE_K=block_k, RANK=rank,
        splits=max(1, min(PROGRAMS // programs, triton.cdiv(K, block_k) // 4, 8)),
        num_warps=4 if block_n == 64 and rank < 64 else 8,
        num_stages=4 if shared >= 163 else 3 if block_m == 16 else 2,
    )  # fmt: skip


FEW = LaunchConfig(
    op="lora_linear_few",
    default=few_config,
    keys=("M", "N", "K", "rank", "transposed"),
    entries=("BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps", "num_stages"),
    candidates=combinations(
        BLOCK_SIZE_N=(32, 64, 128), BLOCK_SIZE_K=(64, 128), num_warps=(4, 8), num_stages=(3, 4)
    ),
)


# -------------------------------------------------------------------------- launchers


def lora_linear_fwd(x, weight, lora_A, lora_B, scaling, gate, bias, kept=None):
    """(y, kept): as `portable.lora_linear_fwd`, without dropout."""
    if kept is None:
        s = kept = new_kept(x, lora_A)
    else:
        s = rank_part(kept, lora_A.shape[0])
    with on_device(x.device):
        y = _few_linear(x, weight, lora_A, lora_B, scaling, gate, bias, s)
    return y, kept


def lora_linear_bwd(dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, dA, dB, dgate): as `portable.lora_linear_bwd`, without dropout."""
    dx = t = None
    with on_device(dy.device):
        if needs[0]:
            t = new_kept(dy, lora_A)
            dx = _few_linear(dy, weight.T, lora_B.T, lora_A.T, scaling, gate, None, t)
        return dx, *adapter_gradients(dy, x, lora_A, lora_B, kept, t, scaling, gate, needs)


def _few_linear(v, q, d, p, scaling, gate, bias, u):
    """Y (M, N) = V Q^T + bias + s g U P^T in V's dtype; writes U (M, R) = V D^T to ``u``."""
    (m, k), n, r = v.shape, q.shape[0], p.shape[1]
    y, parts, u_parts = v.new_empty((m, n)), None, None
    if not m:
        return y
    index, shared = index_type(r, v, q, d, p), shared_kib(v.device)
    key = m, n, k, r, q.stride(1) != 1
    config = FEW.choose(v.device, (m, n, k, r, shared), key)
    splits, block_k = config.pop("splits"), config["BLOCK_SIZE_K"]
    k_per_split = triton.cdiv(triton.cdiv(k, block_k), splits) * block_k
    splits = triton.cdiv(k, k_per_split)
    d = d.to(v.dtype)  # not in the kernel's loop: Triton 3.6 then read outside of shared memory
    if splits > 1:
        parts = v.new_empty((splits, m, n), dtype=torch.float32)
        u_parts = v.new_empty((splits, m, r), dtype=torch.float32)
    grid = (triton.cdiv(n, config["BLOCK_SIZE_N"]), triton.cdiv(m, config["BLOCK_SIZE_M"]), splits)
    _lora_linear_few_kernel[grid](
        v, q, d, p, gate, bias, y if parts is None else parts, u if parts is None else u_parts,
        scaling, m, n, k, r, k_per_split,
        *v.stride(), *q.stride(), *d.stride(), *p.stride(),
        gate.stride(0) if gate is not None and gate.numel() > 1 else 0,
        0 if bias is None else bias.stride(0), k % block_k == 0, index, **config,
    )  # fmt: skip
    if parts is not None:
        y_blocks, u_blocks = triton.cdiv(m * n, 1024), triton.cdiv(m * r, 1024)
        _few_sum_kernel[(y_blocks + u_blocks,)](
            parts, y, m * n, u_parts, u, m * r, splits, y_blocks, BLOCK_SIZE=1024
        )
    return y
