"""Launches of the sm_90 kernel: what the forward pass keeps, workspaces and descriptors."""

import functools
from typing import NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..runtime.cached_launch import launch_cached
from ..runtime.dtypes import triton_dtype
from ..runtime.gpu import current_stream, is_capturing, on_device
from ..runtime.tuned import padded_rank
from .hopper import (
    COLUMN_ITEMS_RANK,
    NUM_WARPS,
    _lora_linear_hopper_kernel,
)
from .hopper_config import HOPPER, pitch_of, rows_of_item
from .pack_kernel import _pack_kernel
from .portable import gate_gradient
from .schedule import FLAGS

# -------------------------------------------------------------------------- launchers


def kept_shape(M: int, R: int, gated: bool) -> tuple[int, int]:
    """Shape of what the forward pass keeps for the backward pass, in float32.

    It holds U (M, R rounded up to a multiple of 8) in the dtype of x and then, with a gate,
    S = x A^T (M, R) in float32. There is room for S alone too, which is what the other kernels keep
    where they run calls of this backend.
    """
    return M, pitch_of(R) // 2 + R if gated else max(R, 4)


def lora_linear_fwd(x, weight, lora_A, lora_B, scaling, gate, bias, kept=None):
    """(y, kept) for x (M, K): y in x.dtype; kept is what the gradients need beside x.

    ``kept``: a tensor of `kept_shape`; None makes one.
    """
    m, r = x.shape[0], lora_A.shape[0]
    if kept is None:
        kept = x.new_empty(kept_shape(m, r, gate is not None), dtype=torch.float32)
    u, s = _kept_views(kept, r, x.dtype)
    with on_device(x.device):
        x, weight = _for_tma(x), _for_tma(weight)
        y = x.new_empty((m, weight.shape[0]))
        a, b = packed(lora_A, lora_B, x.dtype)
        work = Work.of(x.device, m, y.shape[1], x.shape[1], r, None)
        sync = _sync(x.device, work.flags)
        tensors = x, weight, a, b, u, s, u, x, y, _dense(gate), _dense(bias)
        call, options = kernel_call(work, *tensors, sync, scaling, r)
        launch_cached(*call, **options)
    return y, kept


def lora_linear_bwd(dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, dA, dB, dgate), None for each that ``needs`` (x, A, B, gate) does not ask for.

    x may be None where dA is not asked for.
    """
    return _bwd(dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs)[:4]


def bwd_before_da(dy, weight, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, V, dB, dgate) with V (M, R rounded up to a multiple of 8) = s g dY B, so dA = V^T x."""
    args = dy, None, weight, lora_A, lora_B, kept, scaling, gate, needs
    dx, _, db, dgate, v = _bwd(*args)
    return dx, v, db, dgate


def _bwd(dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, dA, dB, dgate, V)."""
    (m, n), k, r = dy.shape, weight.shape[1], lora_A.shape[0]
    need_x, need_A, need_B, need_gate = needs
    u, s = _kept_views(kept, r, dy.dtype)
    with on_device(dy.device):
        dx = dy.new_empty((m, k))
        x = dx if x is None else x  # without dA no program reads x, so any tensor will do
        dy, x, weight = _for_tma(dy), _for_tma(x), _for_tma(weight)
        v, t = _kept_views(torch.empty_like(kept), r, dy.dtype)
        da, db = (torch.empty_like(p, memory_format=_DENSE) for p in (lora_A, lora_B))
        a, b = packed(lora_A, lora_B, dy.dtype)
        work = Work.of(dy.device, m, k, n, r, (need_A, need_B))
        parts = dy.new_empty(work.parts, dtype=torch.float32)
        sync = _sync(dy.device, work.flags)
        tensors = dy, weight, b, a, v, t, u, x, dx, _dense(gate), None
        call, options = kernel_call(work, *tensors, sync, scaling, r, da, db, parts)
        launch_cached(*call, **options)
        if r > COLUMN_ITEMS_RANK:
            da = _product(v[:, :r].T, x, lora_A.dtype) if need_A else None
            db = _product(dy.T, u[:, :r], lora_B.dtype) if need_B else None
        dgate = gate_gradient(t, s, scaling, gate) if need_gate else None
    return dx if need_x else None, da if need_A else None, db if need_B else None, dgate, v


def fits_tma(t) -> bool:
    """Whether TMA reads a matrix where it lies: rows that do not overlap, each 16-byte aligned."""
    dense = t.stride(1) == 1 and t.stride(0) >= t.shape[1] and t.stride(0) % 8 == 0
    return dense and t.data_ptr() % 16 == 0


def _for_tma(t):
    return t if fits_tma(t) else t.clone(memory_format=_DENSE)


def _product(p, q, dtype):
    return torch.mm(p, q, out_dtype=torch.float32).to(dtype)


_DENSE = torch.contiguous_format


def _kept_views(kept, r, dtype):
    """U = s g x A^T (M, pitch) in ``dtype``, and S = x A^T (M, r) float32; see `kept_shape`.

    S is for the gate's gradient, and None where there is no gate.
    """
    m, pitch = kept.shape[0], pitch_of(r)
    gated, kept = kept.shape[1] == pitch // 2 + r, kept.view(-1)
    u = kept[: m * pitch // 2].view(dtype).view(m, pitch)
    return u, kept[m * pitch // 2 :].view(m, r) if gated else None


def _dense(vector):
    return None if vector is None else vector.contiguous()


def packed(a, b, dtype):
    """A (R, K) and B (N, R) in ``dtype``, as TMA can read them; copies where they were not."""
    if needs_no_packing(a, b, dtype):
        return a, b
    shape_a, shape_b = packed_shapes(a, b)
    packed_a, packed_b = a.new_empty(shape_a, dtype=dtype), b.new_empty(shape_b, dtype=dtype)
    call, options = pack_call(a, packed_a, b, packed_b)
    launch_cached(*call, **options)
    return packed_a, packed_b[:, : a.shape[0]]


def needs_no_packing(a, b, dtype) -> bool:
    return a.dtype == dtype and fits_tma(a) and fits_tma(b)


def packed_shapes(a, b):
    (n, r), k = b.shape, a.shape[1]
    return (r, k), (n, pitch_of(r))


def pack_call(a, packed_a, b, packed_b):
    (n, r), k = b.shape, a.shape[1]
    blocks_a, blocks_b = triton.cdiv(r * k, 1024), triton.cdiv(n * r, 1024)
    key = (a.dtype, packed_a.dtype, *(t.data_ptr() % 16 == 0 for t in (a, b)))
    call = (
        _pack_kernel, (blocks_a + blocks_b,), key,
        a, packed_a, b, packed_b, n, k, r, blocks_a,
        *a.stride(), *b.stride(), packed_b.stride(0), 1024,
    )  # fmt: skip
    return call, dict(num_warps=4)


class Work(NamedTuple):
    """How one pass, (M, C) times (C, N), is divided among blocks."""

    config: dict
    grid: tuple[int]
    rank: int
    backward: bool
    flags: int  # int32 entries of sync
    parts: tuple[int, int]  # shape of the partial sums of dB and dA: (splits, entries of both)
    numbers: tuple[int, ...]  # the kernel's arguments from blocks_m to splits

    @classmethod
    def of(cls, device, m, n, c, r, needs) -> "Work":
        """``needs``: whether dA and dB are asked for; None is the forward pass."""
        rank, processors = padded_rank(r), multiprocessors(device)
        config = HOPPER.choose(
            device, (m, n, rank, processors), (m, n, c, rank, needs is not None)
        )  # fmt: skip
        block_m, block_n, block_k = (config[f"BLOCK_SIZE_{d}"] for d in "MNK")
        group = config["GROUP_SIZE_M"]
        blocks_m, blocks_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
        rows = rows_of_item(block_n, rank)
        columns_a = columns_b = 0
        if needs and rank <= COLUMN_ITEMS_RANK:
            columns_a, columns_b = (
                triton.cdiv(size, rows * block_k) if needed else 0
                for size, needed in zip((n, c), needs, strict=True)
            )
        columns = columns_a + columns_b
        # The column items of the last group come last. There is one for each multiprocessor, as
        # long as each has at least four blocks of rows.
        wanted = min(triton.cdiv(processors, max(1, columns)), min(group, blocks_m) // 4)
        rows_per_split = max(1, group >> max(1, wanted).bit_length() - 1)
        splits = triton.cdiv(blocks_m, rows_per_split)
        items = triton.cdiv(blocks_m, rows) + blocks_m * blocks_n
        return cls(
            config, (min(processors, items),), rank, needs is not None,
            FLAGS.value + blocks_m + columns + triton.cdiv(blocks_m, group),
            (splits, r * (n + c)) if splits > 1 and columns else (1, 1),
            (blocks_m, blocks_n, triton.cdiv(c, block_k), columns, columns_b, rows_per_split,
             splits),
        )  # fmt: skip


def kernel_call(
    work, v, weight, down, up, u, s, kept, x, y, gate, bias, sync, scaling, r,
    da=None, db=None, parts=None,
):  # fmt: skip
    """The launch of one pass, as (kernel, grid, key, *arguments) and options."""
    config, rank, backward = work.config, work.rank, work.backward
    block_m, block_n, block_k = (config[f"BLOCK_SIZE_{d}"] for d in "MNK")
    q_block, p_block = (
        ((block_k, block_n), (block_k, rank)) if backward else ((block_n, block_k), (rank, block_k))
    )
    column_items = backward and rank <= COLUMN_ITEMS_RANK
    rank_block = block_m, rank if column_items else block_k  # read by column items alone
    entries = 0 if gate is None else 1 if gate.numel() == 1 else 2
    key = (
        v.dtype, block_n, rank, backward, entries, config["STAGES"], config["GROUP_SIZE_M"],
        *((t.dtype, t.data_ptr() % 16 == 0) if t is not None else None for t in (gate, bias, da)),
    )  # fmt: skip
    call = (
        _lora_linear_hopper_kernel, work.grid, key,
        descriptor(v, block_m, block_k), descriptor(weight, *q_block),
        descriptor(down, *p_block), descriptor(up, *q_block), descriptor(u, block_m, block_k),
        descriptor(u, *rank_block), descriptor(kept, *rank_block),
        descriptor(x, block_m, block_k), descriptor(y, block_m, block_n),
        u, s, gate, bias, db, da, parts, sync,
        float(scaling), v.shape[0], y.shape[1], v.shape[1], r, *work.numbers,
        backward, column_items, entries, config["STAGES"], config["GROUP_SIZE_M"], NUM_WARPS,
    )  # fmt: skip
    return call, dict(num_warps=NUM_WARPS, maxnreg=168)


_syncs: dict[tuple, torch.Tensor] = {}  # by device and stream
_reserves: dict[torch.device, torch.Tensor] = {}  # zeros that captured graphs take theirs from


def _sync(device: torch.device, numel: int) -> torch.Tensor:
    """Zeros, which every launch leaves as zeros again, so eager launches of a stream share them."""
    zeros = functools.partial(torch.zeros, dtype=torch.int32, device=device)
    if is_capturing(device):
        # A graph may run on any stream, beside others, so its launches keep zeros of their own.
        # They were made before the capture: zeros made in a graph are made again in every replay.
        numel = triton.cdiv(numel, 32) * 32  # whole cache lines
        reserve = _reserves.get(device)
        if reserve is None or reserve.numel() < numel:
            return zeros(numel)
        taken, _reserves[device] = reserve[:numel], reserve[numel:]
        return taken
    place = device, current_stream(device)
    set_zeros_aside(device)
    if place not in _syncs or _syncs[place].numel() < numel:
        _syncs[place] = zeros(max(numel, 1024))
    return _syncs[place]


def set_zeros_aside(device: torch.device) -> None:
    """Make the zeros for graphs that may be captured later."""
    if device not in _reserves:
        _reserves[device] = torch.zeros(2**20, dtype=torch.int32, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _layout(block: tuple[int, int], dtype: torch.dtype):
    return gl.NVMMASharedLayout.get_default_for(list(block), triton_dtype(dtype))


def descriptor(t: torch.Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), list(block), _layout(block, t.dtype))
