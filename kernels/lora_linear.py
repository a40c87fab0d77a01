"""LoRA linear with a gate: y = x W^T + bias + s g (x A^T) B^T, and its gradients.

Backward is the same layer transposed, so three kernels serve both ways:

    down        U = V P^T                       S = x A^T            T = dy B
    fwd         Y = V Q^T + bias + s g U P^T    y  (Q = W, P = B)    dx  (Q = W^T, P = A^T)
    wgrad       dP = (s g U)^T V                dA (U = T, V = x)    dB  (U = S, V = dy)

The low-rank term is one more K step of the big product, in the same float32 accumulator. Where a
sum is split over programs, the parts go to memory and are added in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl

from . import lora_linear_few as few
from . import tuned
from .tables import index_type, on_device, shared_kib

# Programs that fill a GPU about twice over. A constant, so that sums are split, and results
# rounded, the same way on every GPU.
PROGRAMS = 256
SECTION = tl.constexpr(256)  # columns that a float32 product sums at a time


@triton.jit
def _scaled_rank_tile(
    u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, dtype: tl.constexpr
):  # fmt: skip
    """s g U for a tile of rows and ranks, rounded once to the dtype of the product."""
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
def _add_product(
    acc, v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k, start, end, K, stride_vk, stride_qk,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """acc + V Q^T over columns start to end; the pointers are to column 0 of the tile's rows."""
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
        acc = tl.dot(v, q.to(v.dtype), acc, input_precision=PRECISION)
        v_ptr += BLOCK_SIZE_K * stride_vk
        q_ptr += BLOCK_SIZE_K * stride_qk
    return acc


@triton.jit
def _product(
    v_ptr, q_ptr, stride_vm, stride_vk, stride_qn, stride_qk, offs_m, offs_n, mask_m, mask_n,
    start, end, K,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """V Q^T over columns start to end, float32.

    float32 operands are summed in sections and these added up: the error of one long sum grows
    with its length, and here nothing else rounds.
    """
    offs_k = tl.arange(0, BLOCK_SIZE_K).to(INDEX)
    v_offs = offs_m[:, None] * stride_vm + offs_k[None, :] * stride_vk
    q_offs = offs_n[None, :] * stride_qn + offs_k[:, None] * stride_qk
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), tl.float32)
    if v_ptr.dtype.element_ty == tl.float32:
        for first in range(start, end, SECTION):
            acc += _add_product(
                tl.zeros_like(acc), v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k,
                first, tl.minimum(first + SECTION, end), K, stride_vk, stride_qk,
                EVEN_K, PRECISION, BLOCK_SIZE_K,
            )  # fmt: skip
    else:
        acc = _add_product(
            acc, v_ptr, q_ptr, v_offs, q_offs, mask_m, mask_n, offs_k,
            start, end, K, stride_vk, stride_qk, EVEN_K, PRECISION, BLOCK_SIZE_K,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["M"])
def _lora_linear_down_kernel(
    v_ptr, p_ptr, u_ptr,
    M, K, R,
    stride_vm, stride_vk, stride_pr, stride_pk,
    K_PER_SPLIT, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """U (split, M, R) float32: U[i] = V P^T over the i-th part of K."""
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, k0 = pid_m.to(tl.int64) * BLOCK_SIZE_M, split.to(tl.int64) * K_PER_SPLIT
    r0 = pid_r.to(tl.int64) * BLOCK_SIZE_R
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_r = tl.arange(0, BLOCK_SIZE_R).to(INDEX)
    mask_m, mask_r = offs_m < M - m0, offs_r < R - r0
    acc = _product(
        v_ptr + m0 * stride_vm, p_ptr + r0 * stride_pr, stride_vm, stride_vk, stride_pr, stride_pk,
        offs_m, offs_r, mask_m, mask_r, k0, tl.minimum(K, k0 + K_PER_SPLIT), K,
        EVEN_K, PRECISION, INDEX, BLOCK_SIZE_K,
    )  # fmt: skip
    u_ptr += (split.to(tl.int64) * M + m0) * R + r0
    u_offs = offs_m[:, None] * R + offs_r[None, :]
    tl.store(u_ptr + u_offs, acc, mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def _lora_linear_fwd_kernel(
    v_ptr, q_ptr, p_ptr, u_ptr, gate_ptr, bias_ptr, y_ptr,
    scaling, M, N, K, R,
    stride_vm, stride_vk, stride_qn, stride_qk, stride_pn, stride_pr, stride_gate, stride_bias,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr, GROUP_SIZE_M: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
    BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = V Q^T + bias + (s g U) P^T, with U (M, R) float32."""
    # Tiles in groups of rows, so that the ones that run together share their operands in L2.
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
    acc = _product(
        v_ptr + m0 * stride_vm, q_ptr + n0 * stride_qn, stride_vm, stride_vk, stride_qn, stride_qk,
        offs_m, offs_n, mask_m, mask_n, tl.cast(0, tl.int64), K, K,
        EVEN_K, PRECISION, INDEX, BLOCK_SIZE_K,
    )  # fmt: skip

    dtype: tl.constexpr = y_ptr.dtype.element_ty
    u_ptr += m0 * R
    p_ptr += n0 * stride_pn
    # One step or a few: pipelining this loop would only take shared memory from the one above.
    for r in tl.range(0, R, BLOCK_SIZE_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_SIZE_R).to(INDEX)
        u = _scaled_rank_tile(
            u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, dtype
        )  # fmt: skip
        p_offs = offs_n[None, :] * stride_pn + offs_r[:, None] * stride_pr
        p = tl.load(p_ptr + p_offs, mask=mask_n[None, :] & (offs_r < R)[:, None], other=0.0)
        acc = tl.dot(u, p.to(dtype), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + (n0 + offs_n) * stride_bias, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    y_ptr += m0 * N + n0
    y_offs = offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptr + y_offs, acc.to(dtype), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "M_PER_SPLIT"])
def _lora_linear_wgrad_kernel(
    u_ptr, v_ptr, gate_ptr, dp_ptr,
    scaling, M, C, R, M_PER_SPLIT,
    stride_vm, stride_vc, stride_gate, stride_dpc, stride_dpr,
    PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_C: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """dP (split, R x C by strides): dP[i] = (s g U)^T V over the i-th part of the tokens."""
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
    acc = tl.zeros((BLOCK_SIZE_C, BLOCK_SIZE_R), tl.float32)
    for m in range(start, end, BLOCK_SIZE_M):
        mask_m = offs_m < end - m
        v = tl.load(v_ptr + v_offs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        u = _scaled_rank_tile(
            u_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_r, mask_m, R, v.dtype
        )  # fmt: skip
        acc = tl.dot(tl.trans(v), u, acc, input_precision=PRECISION)
        v_ptr += BLOCK_SIZE_M * stride_vm
        u_ptr += BLOCK_SIZE_M * R
    dp_ptr += split.to(tl.int64) * C * R + c0 * stride_dpc
    dp_offs = offs_c[:, None] * stride_dpc + offs_r[None, :] * stride_dpr
    mask = mask_c[:, None] & (offs_r < R)[None, :]
    tl.store(dp_ptr + dp_offs, acc.to(dp_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _sum_splits_kernel(parts_ptr, out_ptr, splits, numel, BLOCK_SIZE: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < numel
    total = tl.zeros((BLOCK_SIZE,), tl.float32)
    part_ptrs = parts_ptr + offs
    for _ in range(splits):
        total += tl.load(part_ptrs, mask=mask, other=0.0)
        part_ptrs += numel
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launch configurations


def down_config(M: int, K: int, R: int, itemsize: int) -> dict:
    """Blocks, warps and the number of parts that K is split in."""
    block_m = 16 if M <= 16 else 32 if M <= 1024 else 64
    block_r = min(64 if itemsize == 2 else 32, max(16, triton.next_power_of_2(R)))
    block_k = 32 if itemsize == 4 else 128 if block_r < 64 else 64
    programs = triton.cdiv(M, block_m) * triton.cdiv(R, block_r)
    steps = triton.cdiv(K, block_k)
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_K=block_k, BLOCK_SIZE_R=block_r,
        splits=max(1, min(PROGRAMS // max(1, programs), steps // 4, 16)),
        num_warps=4 if block_r < 64 else 8, num_stages=3,
    )  # fmt: skip


def fwd_config(M: int, N: int, R: int, itemsize: int, precision: str, shared: int) -> dict:
    """Blocks, warps and stages; ``shared``: KiB of shared memory that a block can have."""
    if itemsize == 4 and precision == "ieee":
        blocks = (32, 64, 16, 8, 3) if M <= 32 else (64, 64, 16, 4, 3)
    elif itemsize == 4:
        blocks = (32 if M <= 32 else 64, 64, 32, 4, 3)
    elif M <= 64:
        blocks = (16 if M <= 16 else 32 if M <= 32 else 64, 64, 64, 4, 4)
    elif shared < 163:
        blocks = (128, 128, 32, 8, 4)
    elif shared < 227 or triton.cdiv(M, 128) * triton.cdiv(N, 256) < PROGRAMS // 2:
        blocks = (128, 128, 64, 8, 3)
    else:  # too many registers before sm_90; with few tiles, part of the GPU would be idle
        blocks = (128, 256, 64, 8, 3)
    block_m, block_n, block_k, warps, stages = blocks
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_N=block_n, BLOCK_SIZE_K=block_k,
        BLOCK_SIZE_R=min(32, max(16, triton.next_power_of_2(R))),
        GROUP_SIZE_M=16, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def wgrad_config(M: int, C: int, R: int, itemsize: int) -> dict:
    """Blocks, warps and the number of parts that the tokens are split in."""
    block_m, block_c = (64, 128) if itemsize == 2 else (16, 64)
    block_r = min(64, max(16, triton.next_power_of_2(R)))
    programs = triton.cdiv(C, block_c) * triton.cdiv(R, block_r)
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_C=block_c, BLOCK_SIZE_R=block_r,
        splits=max(1, min(PROGRAMS // programs, triton.cdiv(M, 4 * block_m), 32)),
        num_warps=8, num_stages=3,
    )  # fmt: skip


# -------------------------------------------------------------------------- launchers


def lora_linear_fwd(x, weight, lora_A, lora_B, scaling, gate, bias, S=None):
    """(y, S) for x (M, K): y as above in x.dtype, S = x A^T float32, kept for the gradients.

    ``S``: a tensor to put it in.
    """
    with on_device(x.device):
        return _with_branch(x, weight, lora_A, lora_B, scaling, gate, bias, S)


def lora_linear_bwd(dy, x, weight, lora_A, lora_B, S, scaling, gate, needs):
    """(dx, dA, dB, dgate), None for each that ``needs`` (x, A, B, gate) does not ask for."""
    need_x, need_A, need_B, need_gate = needs
    dx = da = db = dgate = None
    with on_device(dy.device):
        if need_x:
            dx, t = _with_branch(dy, weight.T, lora_B.T, lora_A.T, scaling, gate, None)
        elif need_A or need_gate:
            t = _down(dy, lora_B.T)
        if need_A:
            da = _wgrad(t, x, scaling, gate, torch.empty_like(lora_A, memory_format=_DENSE), False)
        if need_B:
            db = _wgrad(S, dy, scaling, gate, torch.empty_like(lora_B, memory_format=_DENSE), True)
        if need_gate:
            dgate = gate_gradient(t, S, scaling, gate)
    return dx, da, db, dgate


def gate_gradient(T, S, scaling, gate):
    """s sum_m T S, for each rank or in all."""
    # Terms of both signs cancel in these few numbers; in rank space float64 costs little.
    products = T.double() * S.double()
    dgate = scaling * (products.sum(0) if gate.numel() > 1 else products.sum())
    return dgate.to(gate.dtype).reshape(gate.shape)


_DENSE = torch.contiguous_format


def _with_branch(v, q, d, p, scaling, gate, bias, u=None):
    """(Y, U): Y = V Q^T + bias + (s g U) P^T, U = V D^T float32, in ``u`` where one is given."""
    if few.takes(v, q.shape[0], p.shape[1]):
        u = v.new_empty(v.shape[0], p.shape[1], dtype=torch.float32) if u is None else u
        index, shared = index_type(p.shape[1], v, q, d, p), shared_kib(v.device)
        return few.few_linear(v, q, d, p, scaling, gate, bias, u, index, shared), u
    u = _down(v, d, u)
    return _linear(v, q, p, u, scaling, gate, bias), u


def _precision(dtype: torch.dtype) -> str:
    """For float32 products, what PyTorch would do; 16-bit ones have no choice."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _down(v, p, out=None):
    """U (M, R) float32 = V P^T, in ``out`` where one is given."""
    (m, k), r = v.shape, p.shape[0]
    config = tuned.config("lora_linear_down", v.device, down_config, (m, k, r, v.element_size()))
    splits, block_k = config.pop("splits"), config["BLOCK_SIZE_K"]
    k_per_split = triton.cdiv(triton.cdiv(k, block_k), splits) * block_k
    splits = triton.cdiv(k, k_per_split)
    if out is None:
        out = v.new_empty((m, r), dtype=torch.float32)
    u = out if splits == 1 else v.new_empty((splits, m, r), dtype=torch.float32)
    grid = (
        triton.cdiv(m, config["BLOCK_SIZE_M"]),
        triton.cdiv(r, config["BLOCK_SIZE_R"]),
        splits,
    )
    if m:
        _lora_linear_down_kernel[grid](
            v, p, u, m, k, r, *v.stride(), *p.stride(),
            k_per_split, k % block_k == 0, _precision(v.dtype), index_type(r, v, p), **config,
        )  # fmt: skip
    return out if splits == 1 else _sum_splits(u, out)


def _linear(v, q, p, u, scaling, gate, bias):
    """Y (M, N) = V Q^T + bias + (s g U) P^T in V's dtype."""
    (m, k), n, r = v.shape, q.shape[0], p.shape[1]
    y = v.new_empty((m, n))
    precision, size = _precision(v.dtype), v.element_size()
    config = tuned.config(
        "lora_linear_fwd", v.device, fwd_config, (m, n, r, size, precision, shared_kib(v.device)),
        (m, n, k, r, size, q.stride(1) != 1),
    )  # fmt: skip
    grid = (triton.cdiv(m, config["BLOCK_SIZE_M"]) * triton.cdiv(n, config["BLOCK_SIZE_N"]),)
    if m:
        _lora_linear_fwd_kernel[grid](
            v, q, p, u, gate, bias, y, scaling, m, n, k, r,
            *v.stride(), *q.stride(), *p.stride(), _gate_stride(gate),
            0 if bias is None else bias.stride(0),
            k % config["BLOCK_SIZE_K"] == 0, precision, index_type(r, v, q, p, y), **config,
        )  # fmt: skip
    return y


def _wgrad(u, v, scaling, gate, out, transposed):
    """(s g U)^T V into ``out``: (R, C), or (C, R) where ``transposed``."""
    (m, c), r = v.shape, u.shape[1]
    if m == 0:
        return out.zero_()
    config = tuned.config("lora_linear_wgrad", v.device, wgrad_config, (m, c, r, v.element_size()))
    splits, block_m = config.pop("splits"), config["BLOCK_SIZE_M"]
    m_per_split = triton.cdiv(triton.cdiv(m, block_m), splits) * block_m
    splits = triton.cdiv(m, m_per_split)
    parts = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
    grid = (
        triton.cdiv(c, config["BLOCK_SIZE_C"]),
        triton.cdiv(r, config["BLOCK_SIZE_R"]),
        splits,
    )
    _lora_linear_wgrad_kernel[grid](
        u, v, gate, parts, scaling, m, c, r, m_per_split,
        *v.stride(), _gate_stride(gate), *((r, 1) if transposed else (1, c)),
        _precision(v.dtype), index_type(r, v, out), **config,
    )  # fmt: skip
    return out if splits == 1 else _sum_splits(parts, out)


def _gate_stride(gate):
    """A scalar gate is a vector whose entries are all in one place."""
    return gate.stride(0) if gate is not None and gate.numel() > 1 else 0


def _sum_splits(parts, out):
    if out.numel():
        grid = (triton.cdiv(out.numel(), 1024),)
        _sum_splits_kernel[grid](parts, out, parts.shape[0], out.numel(), BLOCK_SIZE=1024)
    return out
