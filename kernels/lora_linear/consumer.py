"""The multiplying warps of the sm_90 kernel, one function for each kind of work item.

`hopper.py` describes the kernel as a whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..runtime.gluon_compat import aggregate, barrier, optional, tma_store
from .schedule import COLUMN_ITEM, FIRST_TILE, RANK_ITEM, async_proxy_fence


@aggregate
class Problem:
    """Y (M, N) = V Q^T + bias + U E^T over C columns, U (M, R) = s g V P^T."""

    M: gl.tensor
    N: gl.tensor
    C: gl.tensor
    R: gl.tensor
    scaling: gl.tensor  # s
    gate_ptr: optional  # g
    bias_ptr: optional
    RANK: gl.constexpr  # R, padded
    BACKWARD: gl.constexpr
    COLUMNS: gl.constexpr  # whether dA and dB are column items
    GATE_ENTRIES: gl.constexpr  # 0, 1, or 2 for one of each rank
    NUM_WARPS: gl.constexpr


@aggregate
class Results:
    """Where results are stored."""

    y: tma.tensor_descriptor
    y_buf: gl.shared_memory_descriptor  # a tile of Y on its way there
    u_ptr: gl.tensor
    s_ptr: optional  # V P^T before the gate, float32, for the gate's gradient
    db_ptr: optional
    da_ptr: optional
    part_ptr: optional  # float32 sums of each split of dB, then dA


@gluon.jit
def _publish(acc, pid_m, problem, results, sync_ptr, schedule, dtype: gl.constexpr):
    """Store U = s g acc for a block of rows, and raise its flag."""
    BLOCK_SIZE_M: gl.constexpr = acc.shape[0]
    RANK: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    u_ptr, s_ptr = results.u_ptr, results.s_ptr
    R, readers = problem.R, schedule.blocks_n
    offs_r = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    offs_m = pid_m * BLOCK_SIZE_M + gl.arange(0, BLOCK_SIZE_M, gl.SliceLayout(1, layout))
    offs_m = offs_m.to(gl.int64)[:, None]
    mask_m = offs_m < problem.M
    if problem.GATE_ENTRIES > 0:
        # The gate's gradient needs the products before the gate, which may be 0.
        gl.store(s_ptr + offs_m * R + offs_r[None, :], acc, mask=mask_m & (offs_r[None, :] < R))
        if problem.GATE_ENTRIES == 1:
            acc *= gl.load(problem.gate_ptr).to(gl.float32)
        else:
            gate = gl.load(problem.gate_ptr + offs_r, mask=offs_r < R, other=0.0)
            acc *= gate.to(gl.float32)[None, :]
    acc *= gl.cast(problem.scaling, gl.float32)
    # Beyond R are zeros of P times V and g, which are NaN where those are infinite.
    u = gl.where(offs_r[None, :] < R, acc, 0.0).to(dtype)
    pitch = (R + 7) // 8 * 8
    gl.store(u_ptr + offs_m * pitch + offs_r[None, :], u, mask=mask_m & (offs_r[None, :] < pitch))
    # The fence and the barrier let TMA see the stores of all threads before the flag is up.
    readers += async_proxy_fence(readers) * 0
    barrier()
    if pid_m < schedule.blocks_m:
        gl.atomic_add(schedule.flag(sync_ptr, pid_m), readers, sem="release")


@gluon.jit
def _rank_item(it, place, problem, results, sync_ptr, pipe, schedule):
    """Compute U for ROWS blocks of rows and publish it."""
    BLOCK_SIZE_M: gl.constexpr = pipe.v_bufs.shape[1]
    RANK: gl.constexpr = problem.RANK
    ROWS: gl.constexpr = pipe.ROWS
    NUM_WARPS: gl.constexpr = problem.NUM_WARPS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, RANK, 16])
    acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    if ROWS == 2:
        more_acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    for _ in range(schedule.steps):
        i = pipe.wait_ready(it)
        if problem.BACKWARD:
            p = pipe.p(i)
        else:
            p = pipe.p(i).permute((1, 0))
        acc = warpgroup_mma(pipe.v_bufs.index(i), p, acc, is_async=True)
        if ROWS == 2:
            more_acc = warpgroup_mma(pipe.more_v(i), p, more_acc, is_async=True)
            acc, more_acc = warpgroup_mma_wait(0, (acc, more_acc))
        else:
            acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(pipe.empty.index(i), count=1)
        it += 1
    _publish(acc, place * ROWS, problem, results, sync_ptr, schedule, pipe.v_bufs.dtype)
    if ROWS == 2:
        _publish(
            more_acc, place * ROWS + 1, problem, results, sync_ptr, schedule, pipe.v_bufs.dtype
        )  # fmt: skip
    return it


@gluon.jit
def _tile(it, pid_m, pid_n, problem, results, pipe, steps):
    """Compute a tile of Y = V Q^T + bias + U E^T."""
    y_buf = results.y_buf
    BLOCK_SIZE_M: gl.constexpr = y_buf.shape[0]
    BLOCK_SIZE_N: gl.constexpr = y_buf.shape[1]
    BLOCK_SIZE_K: gl.constexpr = pipe.v_bufs.shape[2]
    RANK: gl.constexpr = problem.RANK
    STAGES: gl.constexpr = pipe.STAGES
    NUM_WARPS: gl.constexpr = problem.NUM_WARPS
    LAST_RANKS: gl.constexpr = RANK if RANK < BLOCK_SIZE_K else BLOCK_SIZE_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_SIZE_N, 16])
    n0 = pid_n * BLOCK_SIZE_N
    acc = gl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), gl.float32, layout)
    if problem.bias_ptr is not None:
        offs_n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, layout))
        bias = gl.load(problem.bias_ptr + offs_n, mask=offs_n < problem.N, other=0.0)
        acc += bias.to(gl.float32)[None, :]
    full_steps = steps + (RANK - 1) // BLOCK_SIZE_K
    for k in range(full_steps):
        i = pipe.wait_ready(it)
        if problem.BACKWARD:
            q = pipe.q_bufs.index(i)
        else:
            q = pipe.q_bufs.index(i).permute((1, 0))
        acc = warpgroup_mma(pipe.v_bufs.index(i), q, acc, is_async=True)
        acc = warpgroup_mma_wait(1, (acc,))
        mbarrier.arrive(pipe.empty.index((it + STAGES - 1) % STAGES), count=1, pred=k > 0)
        it += 1
    # The last low-rank step may have fewer than BLOCK_SIZE_K ranks.
    i = pipe.wait_ready(it)
    if problem.BACKWARD:
        e = pipe.q_bufs.index(i).slice(0, LAST_RANKS, dim=0)
    else:
        e = pipe.q_bufs.index(i).slice(0, LAST_RANKS, dim=1).permute((1, 0))
    acc = warpgroup_mma(pipe.v_bufs.index(i).slice(0, LAST_RANKS, dim=1), e, acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(pipe.empty.index((it + STAGES - 1) % STAGES), count=1)
    mbarrier.arrive(pipe.empty.index(i), count=1)
    tma.store_wait(0)
    y_buf.store(acc.to(y_buf.dtype))
    fence_async_shared()
    tma_store(results.y, [pid_m * BLOCK_SIZE_M, n0], y_buf)
    return it + 1


@gluon.jit
def _column_item(
    it, split, out_ptr, part_ptr, count_ptr, c0, stride_c, stride_r, C, R, numel, steps, splits,
    pipe, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Compute ROWS blocks of columns of V^T U over the rows of a split.

    The block that finishes the last split adds up all of them. ``part_ptr`` is the first split's
    sum; ``numel`` is the distance from one split's sum to the next.
    """
    BLOCK_SIZE_K: gl.constexpr = pipe.v_bufs.shape[2]
    RANK: gl.constexpr = pipe.u_bufs.shape[2]
    ROWS: gl.constexpr = pipe.ROWS
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, NUM_WARPS // 4], [16, RANK * 4 // NUM_WARPS, 16]
    )
    acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    more_acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    for _ in range(steps):
        i = pipe.wait_ready(it)
        u = pipe.u(i)
        acc = warpgroup_mma(pipe.v_bufs.index(i).permute((1, 0)), u, acc, is_async=True)
        if ROWS == 2:
            more_v = pipe.more_v(i).permute((1, 0))
            more_acc = warpgroup_mma(more_v, u, more_acc, is_async=True)
            acc, more_acc = warpgroup_mma_wait(0, (acc, more_acc))
        else:
            acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(pipe.empty.index(i), count=1)
        it += 1
    offs_c = c0 + gl.arange(0, BLOCK_SIZE_K, gl.SliceLayout(1, layout))[:, None]
    offs_r = gl.arange(0, RANK, gl.SliceLayout(0, layout))[None, :]
    offs = offs_c * stride_c + offs_r * stride_r
    mask = (offs_c < C) & (offs_r < R)
    more_mask = (offs_c + BLOCK_SIZE_K < C) & (offs_r < R)
    if splits == 1:
        dtype: gl.constexpr = out_ptr.dtype.element_ty
        gl.store(out_ptr + offs, acc.to(dtype), mask=mask)
        if ROWS == 2:
            gl.store(out_ptr + offs + BLOCK_SIZE_K * stride_c, more_acc.to(dtype), mask=more_mask)
    else:
        mine = part_ptr + split.to(gl.int64) * numel
        gl.store(mine + offs, acc, mask=mask)
        if ROWS == 2:
            gl.store(mine + offs + BLOCK_SIZE_K * stride_c, more_acc, mask=more_mask)
        barrier()
        if gl.atomic_add(count_ptr, 1) == splits - 1:
            gl.atomic_xchg(count_ptr, 0, sem="relaxed")
            for c in gl.static_range(ROWS):
                at = offs + c * BLOCK_SIZE_K * stride_c
                inside = more_mask if c else mask
                total = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
                for start in range(0, splits, 4):
                    for j in gl.static_range(4):  # loaded together, added one after the other
                        ptrs = part_ptr + (start + j).to(gl.int64) * numel + at
                        total += gl.load(ptrs, mask=inside & (start + j < splits), other=0.0)
                gl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)
    return it


@gluon.jit
def consume(problem, results, sync_ptr, pipe, schedule):
    """Compute the work items that the producer loads, until it says that there are no more."""
    BLOCK_SIZE_K: gl.constexpr = pipe.v_bufs.shape[2]
    ROWS: gl.constexpr = pipe.ROWS
    NUM_WARPS: gl.constexpr = problem.NUM_WARPS
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    N, C, R = problem.N, problem.C, problem.R
    columns_b, part_ptr = schedule.columns_b, results.part_ptr
    it = 0
    mbarrier.wait(pipe.ready.index(0), 0)
    code = gl.sum(pipe.work.index(0).load(one), 0)
    while code >= 0:
        place = code >> 16
        kind = code & 0xFFFF
        if kind == RANK_ITEM:
            it = _rank_item(it, place, problem, results, sync_ptr, pipe, schedule)
            if problem.COLUMNS:
                group = place * ROWS // schedule.GROUP_SIZE_M
                gl.atomic_add(schedule.rank_items_done(sync_ptr) + group, 1, sem="release")
        elif kind < COLUMN_ITEM:
            it = _tile(it, place, kind - FIRST_TILE, problem, results, pipe, schedule.steps)
        elif problem.COLUMNS:
            column = kind - COLUMN_ITEM
            count_ptr = schedule.splits_done(sync_ptr, column)
            rows = min(
                schedule.rows_per_split, schedule.blocks_m - place * schedule.rows_per_split
            )  # fmt: skip
            numel = R.to(gl.int64) * (C + N)
            if column < columns_b:  # dB (C, R)
                it = _column_item(
                    it, place, results.db_ptr, part_ptr, count_ptr, column * ROWS * BLOCK_SIZE_K,
                    R, 1, C, R, numel, rows, schedule.splits, pipe, NUM_WARPS,
                )  # fmt: skip
            else:  # dA (R, N)
                c0 = (column - columns_b) * ROWS * BLOCK_SIZE_K
                it = _column_item(
                    it, place, results.da_ptr, part_ptr + C * R, count_ptr, c0,
                    1, N, N, R, numel, rows, schedule.splits, pipe, NUM_WARPS,
                )  # fmt: skip
        i = pipe.wait_ready(it)
        code = gl.sum(pipe.work.index(i).load(one), 0)
    tma.store_wait(0)
