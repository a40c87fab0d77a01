"""LoRA linear with a gate: y = x W^T + bias + s g (x A^T) B^T, and its gradients.

Backward is the same layer transposed, so three kernels serve both ways:

    down        U = V P^T                       S = x A^T            T = dy B
    fwd         Y = V Q^T + bias + s g U P^T    y  (Q = W, P = B)    dx  (Q = W^T, P = A^T)
    wgrad       dP = (s g U)^T V                dA (U = T, V = x)    dB  (U = S, V = dy)

The low-rank term is one more K step of the big product, in the same float32 accumulator. Where a
sum is split over programs, the parts go to memory and are added in a fixed order: no atomics.

Dropout puts m x in the place of x, but not in x W^T. The keep mask m is made wherever it is needed
and never stored: down masks x for S, wgrad masks x for dA, and fwd masks the low-rank term of dx.
The factor 1 / (1 - p) is in s.
"""

import torch
import triton
import triton.language as tl

from ..runtime import tuned
from ..runtime.multi_tensor import index_type, on_device, shared_kib
from ..runtime.philox import kept_by_dropout
from .tiles import add_branch, add_product, scaled_rank_tile

# Programs that fill a GPU about twice over. A constant, so that sums are split, and results
# rounded, the same way on every GPU.
PROGRAMS = 256


@triton.jit(do_not_specialize=["M"])
def _lora_linear_down_kernel(
    v_ptr, p_ptr, u_ptr, seed_ptr,
    dropout, M, K, R,
    stride_vm, stride_vk, stride_pr, stride_pk,
    K_PER_SPLIT, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, BLOCK_SIZE_R: tl.constexpr,
):  # fmt: skip
    """U (split, M, R) float32: U[i] = V P^T over the i-th part of K; V after dropout."""
    pid_m, pid_r, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m0, k0 = pid_m.to(tl.int64) * BLOCK_SIZE_M, split.to(tl.int64) * K_PER_SPLIT
    r0 = pid_r.to(tl.int64) * BLOCK_SIZE_R
    offs_m = tl.arange(0, BLOCK_SIZE_M).to(INDEX)
    offs_r = tl.arange(0, BLOCK_SIZE_R).to(INDEX)
    mask_m, mask_r = offs_m < M - m0, offs_r < R - r0
    acc = add_product(
        tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_R), tl.float32),
        v_ptr + m0 * stride_vm, p_ptr + r0 * stride_pr, stride_vm, stride_vk, stride_pr, stride_pk,
        offs_m, offs_r, mask_m, mask_r, k0, tl.minimum(K, k0 + K_PER_SPLIT), K,
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
    """Y (M, N) = V Q^T + bias + m * ((s g U) P^T), with U (M, R) float32; m of dropout, or 1."""
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
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    u_ptr += m0 * R
    p_ptr += n0 * stride_pn
    acc = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), tl.float32)
    if seed_ptr is not None:  # the mask is for the low-rank term alone, so that comes first
        acc = add_branch(
            acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, R,
            stride_pn, stride_pr, dtype, PRECISION, INDEX, BLOCK_SIZE_R,
        )  # fmt: skip
        keep = kept_by_dropout(
            tl.load(seed_ptr), dropout, m0 + offs_m, n0, N, BLOCK_SIZE_N
        )  # fmt: skip
        acc = tl.where(keep, acc, 0.0)
    acc = add_product(
        acc,
        v_ptr + m0 * stride_vm, q_ptr + n0 * stride_qn, stride_vm, stride_vk, stride_qn, stride_qk,
        offs_m, offs_n, mask_m, mask_n, tl.cast(0, tl.int64), K, K,
        None, None, None, EVEN_K, PRECISION, INDEX, BLOCK_SIZE_K,
    )  # fmt: skip
    if seed_ptr is None:
        acc = add_branch(
            acc, u_ptr, p_ptr, gate_ptr, stride_gate, scaling, offs_m, offs_n, mask_m, mask_n, R,
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
    """dP (split, R x C by strides): dP[i] = (s g U)^T V over the i-th part of the tokens.

    V after dropout, where there is a seed.
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

_KEEP_ALL = None, 0.0  # dropout as (seed, the share of elements that is dropped): no dropout


def lora_linear_fwd(
    x, weight, lora_A, lora_B, scaling, gate, bias, kept=None, dropout=0.0, seed=None
):  # fmt: skip
    """(y, kept) for x (M, K): y in x.dtype; kept holds S = x A^T (M, R), for the gradients.

    Args:
        kept: a float32 matrix of M rows, with room for S at its start; None makes an (M, R) one.
        seed: 0-dim int64, the seed of dropout's mask; None is no dropout.
    """
    if kept is None:
        s = kept = new_kept(x, lora_A)
    else:
        s = rank_part(kept, lora_A.shape[0])
    with on_device(x.device):
        _down(x, lora_A, s, (seed, dropout))
        y = _linear(x, weight, lora_B, s, scaling, gate, bias, _KEEP_ALL)
    return y, kept


def lora_linear_bwd(
    dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs, dropout=0.0, seed=None
):  # fmt: skip
    """(dx, dA, dB, dgate), None for each that ``needs`` (x, A, B, gate) does not ask for.

    x may be None where dA is not asked for.
    """
    dx = t = None
    drop = seed, dropout
    with on_device(dy.device):
        if needs[0]:
            t = _down(dy, lora_B.T)
            dx = _linear(dy, weight.T, lora_A.T, t, scaling, gate, None, drop)
        return dx, *adapter_gradients(dy, x, lora_A, lora_B, kept, t, scaling, gate, needs, drop)


def new_kept(x, lora_A):
    """Room for what the forward pass keeps: S (M, R) float32."""
    return x.new_empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32)


def rank_part(kept, r):
    """S (M, R), which lies at the start of what the forward pass keeps."""
    m = kept.shape[0]
    return kept if kept.shape[1] == r else kept.view(-1)[: m * r].view(m, r)


def adapter_gradients(dy, x, lora_A, lora_B, kept, t, scaling, gate, needs, drop=_KEEP_ALL):
    """(dA, dB, dgate), None for each that ``needs`` (x, A, B, gate) does not ask for.

    ``t``: T = dy B (M, R) float32 where it was computed for dx, else None.
    """
    _, need_A, need_B, need_gate = needs
    da = db = dgate = None
    s = rank_part(kept, lora_A.shape[0])
    if t is None and (need_A or need_gate):
        t = _down(dy, lora_B.T)
    if need_A:
        da = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
        _wgrad(t, x, scaling, gate, da, False, drop)
    if need_B:
        db = torch.empty_like(lora_B, memory_format=torch.contiguous_format)
        _wgrad(s, dy, scaling, gate, db, True)
    if need_gate:
        dgate = gate_gradient(t, s, scaling, gate)
    return da, db, dgate


def gate_gradient(T, S, scaling, gate):
    """s sum_m T S, for each rank or summed over ranks, in the dtype and shape of the gate."""
    # Terms of both signs cancel in these few numbers; in rank space float64 costs little.
    products = T.double() * S.double()
    dgate = scaling * (products.sum(0) if gate.numel() > 1 else products.sum())
    return dgate.to(gate.dtype).reshape(gate.shape)


def _precision(dtype: torch.dtype) -> str:
    """The precision of float32 products follows PyTorch's setting; 16-bit products have one."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _down(v, p, out=None, drop=_KEEP_ALL):
    """U (M, R) float32 = V P^T, with V after dropout; written to ``out`` where one is given."""
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
            v, p, u, *drop, m, k, r, *v.stride(), *p.stride(), k_per_split,
            k % block_k == 0, _precision(v.dtype), index_type(r, v, p), **config,
        )  # fmt: skip
    return out if splits == 1 else _sum_splits(u, out)


def _linear(v, q, p, u, scaling, gate, bias, drop):
    """Y (M, N) = V Q^T + bias + (s g U) P^T in V's dtype, with dropout of the last term."""
    (m, k), n, r = v.shape, q.shape[0], p.shape[1]
    y = v.new_empty((m, n))
    precision, size = _precision(v.dtype), v.element_size()
    config = tuned.config(
        "lora_linear_fwd", v.device, fwd_config, (m, n, r, size, precision, shared_kib(v.device)),
        (m, n, k, r, size, q.stride(1) != 1),
    )  # fmt: skip
    seed, dropout = drop
    if seed is not None:  # the mask must fit into registers beside the accumulator
        config["BLOCK_SIZE_N"] = min(128, config["BLOCK_SIZE_N"])
    grid = (triton.cdiv(m, config["BLOCK_SIZE_M"]) * triton.cdiv(n, config["BLOCK_SIZE_N"]),)
    if m:
        _lora_linear_fwd_kernel[grid](
            v, q, p, u, gate, bias, y, seed, scaling, dropout, m, n, k, r,
            *v.stride(), *q.stride(), *p.stride(), _gate_stride(gate),
            0 if bias is None else bias.stride(0), k % config["BLOCK_SIZE_K"] == 0,
            precision, index_type(r, v, q, p, y), **config,
        )  # fmt: skip
    return y


def _wgrad(u, v, scaling, gate, out, transposed, drop=_KEEP_ALL):
    """Writes (s g U)^T V to ``out``, with V after dropout: (R, C), or (C, R) if ``transposed``."""
    (m, c), r, (seed, dropout) = v.shape, u.shape[1], drop
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
        u, v, gate, parts, seed, scaling, dropout, m, c, r, m_per_split,
        *v.stride(), _gate_stride(gate), *((r, 1) if transposed else (1, c)),
        _precision(v.dtype), index_type(r, v, out), **config,
    )  # fmt: skip
    return out if splits == 1 else _sum_splits(parts, out)


def _gate_stride(gate):
    """A scalar gate is read as a vector of stride 0."""
    return gate.stride(0) if gate is not None and gate.numel() > 1 else 0


def _sum_splits(parts, out):
    """Adds up the parts of a sum that was split over programs."""
    if out.numel():
        grid = (triton.cdiv(out.numel(), 1024),)
        _sum_splits_kernel[grid](parts, out, parts.shape[0], out.numel(), BLOCK_SIZE=1024)
    return out
