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

from .hopper_load import FIRST_TILE, FLAGS, RANK_ITEM, RANKS, SUM_ITEM, async_proxy_fence

SUM_BLOCK = gl.constexpr(1024)  # elements of dB in a sum item
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
    gl.store(u_ptr + offs_m * RANK + offs_r[None, :], u, mask=mask_m)
    # Every thread's stores first, for TMA to see; then the flag, one count a reader.
    readers += async_proxy_fence(readers) * 0
    barrier()
    if pid_m < blocks_m:
        gl.atomic_add(sync_ptr + FLAGS + pid_m, readers, sem="release")


@gluon.jit
def _rank_item(
    it, place, kept, u_ptr, s_ptr, gate_ptr, part_ptr, sync_ptr, scaling,
    ready, empty, kept_ready, kept_empty, v_bufs, more_v_bufs, p_bufs, kept_bufs,
    M, C, R, blocks_m, blocks_n, steps,
    BACKWARD: gl.constexpr, GATE_ENTRIES: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """U for ROWS blocks of rows, published; in the backward pass also these rows' part of dB."""
    BLOCK_SIZE_M: gl.constexpr = v_bufs.shape[1]
    BLOCK_SIZE_K: gl.constexpr = v_bufs.shape[2]
    RANK: gl.constexpr = kept_bufs.shape[2]
    P_PER_STAGE: gl.constexpr = p_bufs.shape[0] // STAGES
    FIRST_P: gl.constexpr = P_PER_STAGE * (ROWS - 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, RANK, 16])
    part_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, NUM_WARPS // 4], [16, RANK * 4 // NUM_WARPS, 16]
    )
    acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    more_acc = gl.zeros((BLOCK_SIZE_M, RANK), gl.float32, layout)
    if BACKWARD:
        mbarrier.wait(kept_ready, kept & 1)
        part_ptr += place.to(gl.int64) * C * R
        part_offs_k = gl.arange(0, BLOCK_SIZE_K, gl.SliceLayout(1, part_layout))[:, None]
        part_offs_r = gl.arange(0, RANK, gl.SliceLayout(0, part_layout))[None, :]
    for k in range(steps):
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        v = v_bufs.index(i)
        more_v = more_v_bufs.index(2 * i if ROWS == 2 else i)
        if BACKWARD:
            p = p_bufs.index(i * P_PER_STAGE + FIRST_P)
        else:
            p = p_bufs.index(i * P_PER_STAGE + FIRST_P).permute((1, 0))
        acc = warpgroup_mma(v, p, acc, is_async=True)
        if ROWS == 2:
            more_acc = warpgroup_mma(more_v, p, more_acc, is_async=True)
        if BACKWARD:
            part = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, part_layout)
            part = warpgroup_mma(
                v.permute((1, 0)), kept_bufs.index(0), part, use_acc=False, is_async=True
            )
            if ROWS == 2:
                part = warpgroup_mma(
                    more_v.permute((1, 0)), kept_bufs.index(1), part, is_async=True
                )
                acc, more_acc, part = warpgroup_mma_wait(0, (acc, more_acc, part))
            else:
                acc, part = warpgroup_mma_wait(0, (acc, part))
            mbarrier.arrive(empty.index(i), count=1)
            offs_k = k * BLOCK_SIZE_K + part_offs_k
            mask = (offs_k < C) & (part_offs_r < R)
            gl.store(part_ptr + offs_k * R + part_offs_r, part, mask=mask)
        else:
            if ROWS == 2:
                acc, more_acc = warpgroup_mma_wait(0, (acc, more_acc))
            else:
                acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(empty.index(i), count=1)
        it += 1
    if BACKWARD:
        mbarrier.arrive(kept_empty, count=1)
    _publish(
        acc, place * ROWS, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, M, R, blocks_m, blocks_n,
        GATE_ENTRIES, v_bufs.dtype,
    )  # fmt: skip
    if ROWS == 2:
        _publish(
            more_acc, place * ROWS + 1, u_ptr, s_ptr, gate_ptr, sync_ptr, scaling, M, R, blocks_m,
            blocks_n, GATE_ENTRIES, v_bufs.dtype,
        )  # fmt: skip
    if BACKWARD:
        gl.atomic_add(sync_ptr + RANKS, 1, sem="release")
    return it


@gluon.jit
def _tile(
    it, pid_m, pid_n, y_desc, bias_ptr, ready, empty, v_bufs, q_bufs, y_buf, N, steps,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """A tile of Y = V Q^T + bias + U E^T."""
    BLOCK_SIZE_M: gl.constexpr = y_buf.shape[0]
    BLOCK_SIZE_N: gl.constexpr = y_buf.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_SIZE_N, 16])
    n0 = pid_n * BLOCK_SIZE_N
    acc = gl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), gl.float32, layout)
    if bias_ptr is not None:
        offs_n = n0 + gl.arange(0, BLOCK_SIZE_N, gl.SliceLayout(0, layout))
        bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
        acc += bias[None, :]
    for k in range(steps):
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
    i = it % STAGES
    mbarrier.wait(ready.index(i), (it // STAGES) & 1)
    if BACKWARD:
        e = q_bufs.index(i).slice(0, RANK, dim=0)
    else:
        e = q_bufs.index(i).slice(0, RANK, dim=1).permute((1, 0))
    acc = warpgroup_mma(v_bufs.index(i).slice(0, RANK, dim=1), e, acc, is_async=True)
    acc = warpgroup_mma_wait(0, (acc,))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
    mbarrier.arrive(empty.index(i), count=1)
    tma.store_wait(0)
    y_buf.store(acc.to(y_buf.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [pid_m * BLOCK_SIZE_M, n0], y_buf)
    return it + 1


@gluon.jit
def _sum_item(
    it, place, part_ptr, db_ptr, empty, numel, parts, STAGES: gl.constexpr, NUM_WARPS: gl.constexpr
):
    """SUM_BLOCK elements of dB from its parts."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    mbarrier.arrive(empty.index(it % STAGES), count=1)
    offs = place * SUM_BLOCK + gl.arange(0, SUM_BLOCK, layout)
    mask = offs < numel
    total = gl.zeros((SUM_BLOCK,), gl.float32, layout)
    for first in range(0, parts, 8):
        for j in gl.static_range(8):  # loaded together, added one after the other
            ptrs = part_ptr + (first + j).to(gl.int64) * numel + offs
            total += gl.load(ptrs, mask=mask & (first + j < parts), other=0.0)
    gl.store(db_ptr + offs, total.to(db_ptr.dtype.element_ty), mask=mask)
    return it + 1


@gluon.jit
def _column_item(
    it, place, da_ptr, da_part_ptr, sync_ptr, ready, empty, v_bufs, more_v_bufs, u_bufs,
    K, R, blocks_m, blocks_c, rows_per_split, splits,
    STAGES: gl.constexpr, ROWS: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Columns of dA = V^T X over some of the rows; whoever comes last adds up all of them."""
    BLOCK_SIZE_K: gl.constexpr = v_bufs.shape[2]
    RANK: gl.constexpr = u_bufs.shape[2]
    U_PER_STAGE: gl.constexpr = u_bufs.shape[0] // STAGES
    FIRST_U: gl.constexpr = U_PER_STAGE * (ROWS - 1) // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, NUM_WARPS // 4], [16, RANK * 4 // NUM_WARPS, 16]
    )
    block_c = place % blocks_c
    split = place // blocks_c
    first = split * rows_per_split
    acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    more_acc = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
    for _ in range(first, min(first + rows_per_split, blocks_m)):
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
    offs_k = block_c * ROWS * BLOCK_SIZE_K
    offs_k += gl.arange(0, BLOCK_SIZE_K, gl.SliceLayout(1, layout))[:, None]
    offs_r = gl.arange(0, RANK, gl.SliceLayout(0, layout))[None, :]
    offs = offs_r * K + offs_k
    mask = (offs_k < K) & (offs_r < R)
    more_mask = (offs_k + BLOCK_SIZE_K < K) & (offs_r < R)
    gl.store(da_part_ptr + split * R * K + offs, acc, mask=mask)
    if ROWS == 2:
        gl.store(da_part_ptr + split * R * K + offs + BLOCK_SIZE_K, more_acc, mask=more_mask)
    barrier()
    count_ptr = sync_ptr + FLAGS + blocks_m + block_c
    if gl.atomic_add(count_ptr, 1) == splits - 1:
        gl.atomic_xchg(count_ptr, 0, sem="relaxed")
        for c in gl.static_range(ROWS):
            at = offs + c * BLOCK_SIZE_K
            inside = more_mask if c else mask
            total = gl.zeros((BLOCK_SIZE_K, RANK), gl.float32, layout)
            for start in range(0, splits, 4):
                for j in gl.static_range(4):
                    ptrs = da_part_ptr + (start + j) * R * K + at
                    total += gl.load(ptrs, mask=inside & (start + j < splits), other=0.0)
            gl.store(da_ptr + at, total.to(da_ptr.dtype.element_ty), mask=inside)
    return it


@gluon.jit
def multiply(
    y_desc, u_ptr, s_ptr, gate_ptr, bias_ptr, part_ptr, db_ptr, da_ptr, da_part_ptr, sync_ptr,
    scaling, ready, empty, kept_ready, kept_empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs,
    u_bufs, kept_bufs, y_buf, M, N, C, R, blocks_m, blocks_n, steps, blocks_c, rows_per_split,
    splits,
    BACKWARD: gl.constexpr, GATE_ENTRIES: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):  # fmt: skip
    RANK: gl.constexpr = kept_bufs.shape[2]
    one: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    it = 0
    kept = 0
    mbarrier.wait(ready.index(0), 0)
    code = gl.sum(drawn.index(0).load(one), 0)
    while code >= 0:
        place = code >> 16
        kind = code & 0xFFFF
        if kind == RANK_ITEM:
            it = _rank_item(
                it, place, kept, u_ptr, s_ptr, gate_ptr, part_ptr, sync_ptr, scaling,
                ready, empty, kept_ready, kept_empty, v_bufs, more_v_bufs, p_bufs, kept_bufs,
                M, C, R, blocks_m, blocks_n, steps, BACKWARD, GATE_ENTRIES, STAGES, ROWS, NUM_WARPS,
            )  # fmt: skip
            kept += 1
        elif kind < SUM_ITEM:
            it = _tile(
                it, place, kind - FIRST_TILE, y_desc, bias_ptr, ready, empty, v_bufs, q_bufs, y_buf,
                N, steps, RANK, BACKWARD, STAGES, NUM_WARPS,
            )  # fmt: skip
        elif BACKWARD:
            if kind == SUM_ITEM:
                parts = (blocks_m + ROWS - 1) // ROWS
                it = _sum_item(it, place, part_ptr, db_ptr, empty, C * R, parts, STAGES, NUM_WARPS)
            else:
                it = _column_item(
                    it, place, da_ptr, da_part_ptr, sync_ptr, ready, empty, v_bufs, more_v_bufs,
                    u_bufs, N, R, blocks_m, blocks_c, rows_per_split, splits,
                    STAGES, ROWS, NUM_WARPS,
                )  # fmt: skip
        i = it % STAGES
        mbarrier.wait(ready.index(i), (it // STAGES) & 1)
        code = gl.sum(drawn.index(i).load(one), 0)
    tma.store_wait(0)
