"""The multiplying warps of the sm_90 kernel, one function for each kind of work; see
`lora_linear_hopper` for the whole.
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

from .producer import COLUMN_ITEM, FIRST_TILE, FLAGS, RANK_ITEM, async_proxy_fence

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name before Triton 3.7


@gluon.jit
def _publish(
    acc, pid_m, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, M, R, blocks_m, readers,
    GATE_ENTRIES: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Store U = s g acc for a block of rows, and raise its flag."""
    BLOCK_SIZE_M: gl.constexpr = acc.shape[0]
    RANK: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = acc.type.layout
    offs_r = gl.arange(0, RANK, gl.SliceLayout(0, layout))
    offs_m = pid_m * BLOCK_SIZE_M + gl.arange(0, BLOCK_SIZE_M, gl.SliceLayout(1, layout))
    offs_m = offs_m.to(gl.int64)[:, None]
    mask_m = offs_m < M
    if GATE_ENTRIES > 0:
        # dg is made of the products before the gate, which may be 0
        gl.store(s_ptr + offs_m * R + offs_r[None, :], acc, mask=mask_m & (offs_r[None, :] < R))
        if GATE_ENTRIES == 1:
            acc *= gl.load(gate_ptr).to(gl.float32)
        else:
            gate = gl.load(gate_ptr + offs_r, mask=offs_r < R, other=0.0)
            acc *= gate.to(gl.float32)[None, :]
    u = (acc * gl.cast(scaling, gl.float32)).to(dtype)
    pitch = (R + 7) // 8 * 8
    gl.store(u_ptr + offs_m * pitch + offs_r[None, :], u, mask=mask_m & (offs_r[None, :] < pitch))
    # Every thread's stores first, for TMA to see; then the flag, one count a reader.
    readers += async_proxy_fence(readers) * 0
    barrier()
    if pid_m < blocks_m:
        gl.atomic_add(sync_ptr + FLAGS + pid_m, readers, sem="release")


@gluon.jit
def _rank_item(
    it, place, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling,
    ready, empty, v_bufs, more_v_bufs, p_bufs, M, R, blocks_m, blocks_n, steps,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, GATE_ENTRIES: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """U for ROWS blocks of rows, published."""
    BLOCK_SIZE_M: gl.constexpr = v_bufs.shape[1]
    P_PER_STAGE: gl.constexpr = p_bufs.shape[0] // STAGES
    FIRST_P: gl.constexpr = P_PER_STAGE * (ROWS - 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, RANK, 16])
    acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    if ROWS == 2:
        more_acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    for _ in range(steps):
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        if BACKWARD:
            p = p_bufs.index(i * P_PER_STAGE + FIRST_P)
        else:
            p = p_bufs.index(i * P_PER_STAGE + FIRST_P).permute((1, 0))
        acc = warpgroup_mma(v_bufs.index(i), p, acc, is_async=True)
        if ROWS == 2:
            more_acc = warpgroup_mma(more_v_bufs.index(2 * i), p, more_acc, is_async=True)
            acc, more_acc = warpgroup_mma_wait(0, (acc, more_acc))
        else:
            acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(i), count=1)
        it += 1
    _publish(
        acc, place * ROWS, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, M, R, blocks_m, blocks_n,
        GATE_ENTRIES, v_bufs.dtype,
    )  # fmt: skip
    if ROWS == 2:
        _publish(
            more_acc, place * ROWS + 1, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, M, R, blocks_m,
            blocks_n, GATE_ENTRIES, v_bufs.dtype,
        )  # fmt: skip
    return it


@gluon.jit
def _tile(
    it, pid_m, pid_n, y_desc, bias_ptr, ready, empty, v_bufs, q_bufs, y_buf, N, steps,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """A tile of Y = V Q^T + bias + U E^T."""
    BLOCK_SIZE_M: gl.constexpr = y_buf.shape[0]
    BLOCK_SIZE_N: gl.constexpr = y_buf.shape[1]
    BLOCK_SIZE_K: gl.constexpr = v_bufs.shape[2]
    LAST_RANKS: gl.constexpr = RANK if RANK < BLOCK_SIZE_K else BLOCK_SIZE_K
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_SIZE_N, 16])
    n0 = pid_n * BLOCK_SIZE_N
    acc = gl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), gl.float32, layout)
    if bias_ptr is not None:
        offs_n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc += bias[None, :]
    full_steps = steps + (RANK - 1) // BLOCK_SIZE_K
    for k in range(full_steps):
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        if BACKWARD:
            q = q_bufs.index(i)
        else:
            q = q_bufs.index(i).permute((1, 0))
        acc = warpgroup_mma(v_bufs.index(i), q, acc, is_async=True)
        acc = warpgroup_mma_wait(1, (acc,))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=k > 0)
        it += 1
    # The last low-rank step, which may be a short one.
    i = it % STAGES
    mbarrier.wait(ready.index(i), (it // STAGES) & 1)
    if BACKWARD:
        e = q_bufs.index(i).slice(0, LAST_RANKS, dim=0)
    else:
        e = q_bufs.index(i).slice(0, LAST_RANKS, dim=1).permute((1, 0))
    acc = warpgroup_mma(v_bufs.index(i).slice(0, LAST_RANKS, dim=1), e, acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
    mbarrier.arrive(empty.index(i), count=1)
    tma.store_wait(0)
    y_buf.store(acc.to(y_buf.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [pid_m * BLOCK_SIZE_M, n0], y_buf)
    return it + 1


@gluon.jit
def _column_item(
    it, split, out_ptr, part_ptr, count_ptr, c0, stride_c, stride_r, C, R, numel, steps, splits,
    ready, empty, v_bufs, more_v_bufs, u_bufs,
    STAGES: gl.constexpr, ROWS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """ROWS blocks of columns of V^T U over some of the rows; whoever comes last adds up all splits.

    ``part_ptr``: the first split's; ``numel``: from one split to the next.
    """
    BLOCK_SIZE_K: gl.constexpr = v_bufs.shape[2]
    RANK: gl.constexpr = u_bufs.shape[2]
    U_PER_STAGE: gl.constexpr = u_bufs.shape[0] // STAGES
    FIRST_U: gl.constexpr = U_PER_STAGE * (ROWS - 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, NUM_WARPS // 4], [16, RANK * 4 // NUM_WARPS, 16]
    )
    acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    more_acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    for _ in range(steps):
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        u = u_bufs.index(i * U_PER_STAGE + FIRST_U)
        acc = warpgroup_mma(v_bufs.index(i).permute((1, 0)), u, acc, is_async=True)
        if ROWS == 2:
            more_v = more_v_bufs.index(2 * i).permute((1, 0))
            more_acc = warpgroup_mma(more_v, u, more_acc, is_async=True)
            acc, more_acc = warpgroup_mma_wait(0, (acc, more_acc))
        else:
            acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(empty.index(i), count=1)
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
def multiply(
    y_desc, u_ptr, s_ptr, gate_ptr, bias_ptr, db_ptr, da_ptr, part_ptr, sync_ptr,
    scaling, ready, empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs, y_buf,
    M, N, C, R, blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, COLUMNS: gl.constexpr, GATE_ENTRIES: gl.constexpr,
    STAGES: gl.constexpr, GROUP_SIZE_M: gl.constexpr, ROWS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    BLOCK_SIZE_K: gl.constexpr = v_bufs.shape[2]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    it = 0
    mbarrier.wait(ready.index(0), 0)
    code = gl.sum(drawn.index(0).load(one), 0)
    while code >= 0:
        place = code >> 16
        kind = code & 0xFFFF
        if kind == RANK_ITEM:
            it = _rank_item(
                it, place, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, ready, empty, v_bufs,
                more_v_bufs, p_bufs, M, R, blocks_m, blocks_n, steps,
                RANK, BACKWARD, GATE_ENTRIES, STAGES, ROWS, NUM_WARPS,
            )  # fmt: skip
            if COLUMNS:
                group = place * ROWS // GROUP_SIZE_M
                done_ptr = sync_ptr + FLAGS + blocks_m + columns
                gl.atomic_add(done_ptr + group, 1, sem="release")
        elif kind < COLUMN_ITEM:
            it = _tile(
                it, place, kind - FIRST_TILE, y_desc, bias_ptr, ready, empty, v_bufs, q_bufs, y_buf,
                N, steps, RANK, BACKWARD, STAGES, NUM_WARPS,
            )  # fmt: skip
        elif COLUMNS:
            column = kind - COLUMN_ITEM
            count_ptr = sync_ptr + FLAGS + blocks_m + column
            rows = min(rows_per_split, blocks_m - place * rows_per_split)
            numel = R.to(gl.int64) * (C + N)
            if column < columns_b:  # dB (C, R)
                it = _column_item(
                    it, place, db_ptr, part_ptr, count_ptr, column * ROWS * BLOCK_SIZE_K, R, 1,
                    C, R, numel, rows, splits, ready, empty, v_bufs, more_v_bufs, u_bufs,
                    STAGES, ROWS, NUM_WARPS,
                )  # fmt: skip
            else:  # dA (R, N)
                c0 = (column - columns_b) * ROWS * BLOCK_SIZE_K
                it = _column_item(
                    it, place, da_ptr, part_ptr + C * R, count_ptr, c0, 1, N,
                    N, R, numel, rows, splits, ready, empty, v_bufs, more_v_bufs, u_bufs,
                    STAGES, ROWS, NUM_WARPS,
                )  # fmt: skip
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        code = gl.sum(drawn.index(i).load(one), 0)
    tma.store_wait(0)
