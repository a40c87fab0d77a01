"""LoRA linear with a gate: y = x W^T + bias + s g (x A^T) B^T, and its gradients.

The backward pass of the layer is the same layer transposed, so three kernels serve both passes:

    down        U = V P^T                       S = x A^T            T = dy B
    fwd         Y = V Q^T + bias + s g U P^T    y  (Q = W, P = B)    dx  (Q = W^T, P = A^T)
    wgrad       dP = (s g U)^T V                dA (U = T, V = x)    dB  (U = S, V = dy)

The low-rank term is one more K step of the big product, in the same float32 accumulator. If a sum
is split over programs, they store its parts, which are then added in a fixed order, without
atomics.

Dropout replaces x by m x, except in x W^T. Kernels compute the keep mask m wherever they need it
and never store it: down masks x for S, wgrad masks x for dA, and fwd masks the low-rank term of dx.
The factor 1 / (1 - p) is part of s.
"""

import torch
import triton

from ..runtime.gpu import on_device, shared_kib
from .portable_config import DOWN, FWD, WGRAD
from .portable_kernels import (
    _lora_linear_down_kernel,
    _lora_linear_fwd_kernel,
    _lora_linear_wgrad_kernel,
    _sum_splits_kernel,
)
from .tiles import index_type

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
    config = DOWN.choose(v.device, (m, k, r, v.element_size()))
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
    args = m, n, r, size, precision, shared_kib(v.device)
    config = FWD.choose(v.device, args, (m, n, k, r, size, q.stride(1) != 1))
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
    config = WGRAD.choose(v.device, (m, c, r, v.element_size()))
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
