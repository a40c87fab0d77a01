"""`lora_linear` for few tokens, where most of the time goes into reading W.

    Y = V Q^T + bias + s g U P^T,    U = V D^T        (Q = W, D = A, P = B; or their transposes)

Each program multiplies its rows by D itself, beside its columns of Q: this saves a launch and the
wait for it. K is split into parts so that the whole GPU reads. A second kernel then adds the parts
up, in a fixed order, and the low-rank term to their sum: parts of U may differ in sign where U does
not, so an infinite gate times each of them would give NaN.
"""

import torch
import triton
import triton.language as tl

from ..runtime.gpu import on_device, shared_kib
from ..runtime.tuned import LaunchConfig, combinations
from .portable import adapter_gradients, new_kept, rank_part
from .portable_config import PROGRAMS
from .tiles import index_type


@triton.jit
def _finished(
    acc, u, p_ptr, gate_ptr, bias_ptr, scaling, offs_n, mask_n, R,
    stride_pn, stride_pr, stride_gate, stride_bias, dtype: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """acc + bias + (s g U) P^T; the pointers of P and bias point to the tile's first column."""
    offs_r = tl.arange(0, RANK).to(offs_n.dtype)
    mask_r = offs_r < R
    factor = tl.full((RANK,), 1.0, tl.float32) * tl.cast(scaling, tl.float32)
    if gate_ptr is not None:
        factor *= tl.load(gate_ptr + offs_r * stride_gate, mask=mask_r, other=0.0).to(tl.float32)
    # Beyond R are zeros of D times V and g, which are NaN where those are infinite.
    u = tl.where(mask_r[None, :], u * factor[None, :], 0.0).to(dtype)
    p_ptrs = p_ptr + offs_n[None, :] * stride_pn + offs_r[:, None] * stride_pr
    p = tl.load(p_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
    acc = tl.dot(u, p.to(dtype), acc)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M"])  # Triton does specialise on K_PER_SPLIT % 16 == 0
def _lora_linear_few_kernel(
    v_ptr, q_ptr, d_ptr, p_ptr, gate_ptr, bias_ptr, y_ptr, u_ptr,
    scaling, M, N, K, R, K_PER_SPLIT,
    stride_vm, stride_vk, stride_qn, stride_qk, stride_dr, stride_dk, stride_pn, stride_pr,
    stride_gate, stride_bias,
    EVEN_K: tl.constexpr, INDEX: tl.constexpr, BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Y (M, N) and U (M, R) float32.

    Without P: (split, M, N) and (split, M, R) float32, V Q^T and V D^T over the parts of K.
    """
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
    if p_ptr is not None:
        if bias_ptr is not None:
            bias_ptr += n0 * stride_bias
        acc = _finished(
            acc, u, p_ptr + n0 * stride_pn, gate_ptr, bias_ptr, scaling, offs_n, mask_n, R,
            stride_pn, stride_pr, stride_gate, stride_bias, v_ptr.dtype.element_ty, RANK,
        )  # fmt: skip
    y_ptrs = y_ptr + rows[:, None] * N + (n0 + offs_n)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _sum_of_parts(ptrs, mask, distance, splits):
    """The sum of the parts of a tile; ``distance``: elements from one part to the next."""
    total = tl.zeros(ptrs.shape, tl.float32)
    for first in range(0, splits, 4):
        for i in tl.static_range(4):  # loaded together, added one after the other
            part = tl.load(ptrs + (first + i) * distance, mask=mask & (first + i < splits), other=0)
            total += part
    return total


@triton.jit(do_not_specialize=["M", "splits"])
def _few_sum_kernel(
    y_parts_ptr, u_parts_ptr, p_ptr, gate_ptr, bias_ptr, y_ptr, u_ptr,
    scaling, M, N, R, splits, stride_pn, stride_pr, stride_gate, stride_bias,
    INDEX: tl.constexpr, BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """Y (M, N) and U (M, R) float32 from the parts that the kernel above left."""
    m0 = tl.program_id(1).to(tl.int64) * BLOCK_SIZE_M
    n0 = tl.program_id(0).to(tl.int64) * BLOCK_SIZE_N
    offs_m, offs_n = tl.arange(0, BLOCK_SIZE_M), tl.arange(0, BLOCK_SIZE_N).to(INDEX)
    offs_r = tl.arange(0, RANK)
    rows, mask_n = (m0 + offs_m)[:, None], offs_n < N - n0
    mask_m = rows < M
    u_offs, u_mask = rows * R + offs_r[None, :], mask_m & (offs_r < R)[None, :]
    y_offs, y_mask = rows * N + (n0 + offs_n)[None, :], mask_m & mask_n[None, :]
    u = _sum_of_parts(u_parts_ptr + u_offs, u_mask, M.to(tl.int64) * R, splits)
    acc = _sum_of_parts(y_parts_ptr + y_offs, y_mask, M.to(tl.int64) * N, splits)
    if n0 == 0:
        tl.store(u_ptr + u_offs, u, mask=u_mask)
    if bias_ptr is not None:
        bias_ptr += n0 * stride_bias
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    acc = _finished(
        acc, u, p_ptr + n0 * stride_pn, gate_ptr, bias_ptr, scaling, offs_n, mask_n, R,
        stride_pn, stride_pr, stride_gate, stride_bias, dtype, RANK,
    )  # fmt: skip
    tl.store(y_ptr + y_offs, acc.to(dtype), mask=y_mask)


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
    y = v.new_empty((m, n))
    if not m:
        return y
    index, shared = index_type(r, v, q, d, p), shared_kib(v.device)
    key = m, n, k, r, q.stride(1) != 1
    config = FEW.choose(v.device, (m, n, k, r, shared), key)
    splits, block_k = config.pop("splits"), config["BLOCK_SIZE_K"]
    k_per_split = triton.cdiv(triton.cdiv(k, block_k), splits) * block_k
    splits = triton.cdiv(k, k_per_split)
    d = d.to(v.dtype)  # not in the kernel's loop: Triton 3.6 then read outside of shared memory
    grid = triton.cdiv(n, config["BLOCK_SIZE_N"]), triton.cdiv(m, config["BLOCK_SIZE_M"])
    last = p, gate, bias  # what the low-rank term needs, and the bias
    strides = (
        *p.stride(),
        gate.stride(0) if gate is not None and gate.numel() > 1 else 0,
        0 if bias is None else bias.stride(0),
    )
    ours, results = last, (y, u)
    if splits > 1:
        ours = None, None, None
        results = (
            v.new_empty((splits, m, n), dtype=torch.float32),
            v.new_empty((splits, m, r), dtype=torch.float32),
        )
    _lora_linear_few_kernel[(*grid, splits)](
        v, q, d, *ours, *results, scaling, m, n, k, r, k_per_split,
        *v.stride(), *q.stride(), *d.stride(), *strides, k % block_k == 0, index, **config,
    )  # fmt: skip
    if splits > 1:
        rows, columns = 16, 64  # few, so that there are many programs, which read at once
        _few_sum_kernel[(triton.cdiv(n, columns), triton.cdiv(m, rows))](
            *results, *last, y, u, scaling, m, n, r, splits, *strides,
            index, rows, columns, config["RANK"],
        )  # fmt: skip
    return y
