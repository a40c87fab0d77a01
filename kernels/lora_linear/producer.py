"""The loading warp of the sm_90 kernel: it draws work items and fills the pipeline by TMA.

`hopper.py` describes the kernel as a whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..runtime.gluon_compat import aggregate, tma_load
from .schedule import COLUMN_ITEM, DRAWN, END, EXITS, FIRST_TILE, RANK_ITEM, async_proxy_fence


@aggregate
class Sources:
    """Descriptors of all that is loaded, under the names of `hopper.py`."""

    v: tma.tensor_descriptor
    q: tma.tensor_descriptor
    p: tma.tensor_descriptor
    e: tma.tensor_descriptor
    u: tma.tensor_descriptor  # blocks of BLOCK_SIZE_K ranks, which tiles take
    u_rank: tma.tensor_descriptor  # the same matrix in blocks of all ranks, for column items
    kept: tma.tensor_descriptor  # U of the forward pass, for dB
    x: tma.tensor_descriptor  # for dA


@gluon.jit
def _load_rank_item(sources, pipe, it, code, m0, steps, BACKWARD: gl.constexpr):
    """Load ROWS blocks of rows of V from row ``m0`` on, and P, one K step a stage."""
    v_desc, p_desc = sources.v, sources.p
    BLOCK_SIZE_M: gl.constexpr = v_desc.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = v_desc.block_type.shape[1]
    for k in range(steps):
        i = pipe.wait_empty(it)
        if k == 0:  # the first stage of a work item says which one it is
            pipe.work.index(i).store(code)
        k0 = k * BLOCK_SIZE_K
        bar = pipe.ready.index(i)
        mbarrier.expect(bar, pipe.ROWS * v_desc.block_type.nbytes + p_desc.block_type.nbytes)
        tma_load(v_desc, [m0, k0], bar, pipe.v_bufs.index(i))
        if pipe.ROWS == 2:
            tma_load(v_desc, [m0 + BLOCK_SIZE_M, k0], bar, pipe.more_v(i))
        if BACKWARD:
            tma_load(p_desc, [k0, 0], bar, pipe.p(i))
        else:
            tma_load(p_desc, [0, k0], bar, pipe.p(i))
        it += 1
    return it


@gluon.jit
def _load_tile(
    sources, pipe, it, code, m0, n0, steps, next_t, sync_ptr, flag_ptr,
    RANK: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Load V and Q for a tile of Y, then U and E for its low-rank steps; draw the next work item.

    Returns the iteration and the number of the next work item.
    """
    v_desc, q_desc, u_desc, e_desc = sources.v, sources.q, sources.u, sources.e
    BLOCK_SIZE_K: gl.constexpr = v_desc.block_type.shape[1]
    up = 0
    for k in range(steps):
        i = pipe.wait_empty(it)
        if k == 0:
            pipe.work.index(i).store(code)
        k0 = k * BLOCK_SIZE_K
        bar = pipe.ready.index(i)
        mbarrier.expect(bar, v_desc.block_type.nbytes + q_desc.block_type.nbytes)
        tma_load(v_desc, [m0, k0], bar, pipe.v_bufs.index(i))
        if BACKWARD:
            tma_load(q_desc, [k0, n0], bar, pipe.q_bufs.index(i))
        else:
            tma_load(q_desc, [n0, k0], bar, pipe.q_bufs.index(i))
        it += 1
        # Memory takes a while to answer, so ask while the consumer still has full stages.
        if k == steps // 4:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
        if k == steps // 2:
            up = gl.atomic_add(flag_ptr, 0, sem="acquire")
    while up == 0:
        up = gl.atomic_add(flag_ptr, 0, sem="acquire")
    gl.atomic_add(flag_ptr, -1, sem="relaxed")  # the last reader leaves the flag at 0
    m0 += async_proxy_fence(up) * 0
    for r0 in gl.static_range(0, RANK, BLOCK_SIZE_K):
        i = pipe.wait_empty(it)
        bar = pipe.ready.index(i)
        mbarrier.expect(bar, u_desc.block_type.nbytes + e_desc.block_type.nbytes)
        tma_load(u_desc, [m0, r0], bar, pipe.v_bufs.index(i))
        if BACKWARD:
            tma_load(e_desc, [r0, n0], bar, pipe.q_bufs.index(i))
        else:
            tma_load(e_desc, [n0, r0], bar, pipe.q_bufs.index(i))
        it += 1
    return it, next_t


@gluon.jit
def _load_column_item(
    desc, u_desc, pipe, it, code, first, end, c0, done_ptr, wanted, WAIT: gl.constexpr
):  # fmt: skip
    """Load ROWS blocks of columns of a matrix from column ``c0`` on, and the U to multiply with.

    One stage takes one of the blocks of rows from ``first`` to ``end``. With WAIT, U is loaded
    once ``done_ptr`` counts ``wanted`` rank items.
    """
    BLOCK_SIZE_M: gl.constexpr = desc.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = desc.block_type.shape[1]
    fence = 0
    for pid_m in range(first, end):
        i = pipe.wait_empty(it)
        if pid_m == first:
            pipe.work.index(i).store(code)
        m0 = pid_m * BLOCK_SIZE_M
        bar = pipe.ready.index(i)
        mbarrier.expect(bar, pipe.ROWS * desc.block_type.nbytes + u_desc.block_type.nbytes)
        tma_load(desc, [m0, c0], bar, pipe.v_bufs.index(i))
        if pipe.ROWS == 2:
            tma_load(desc, [m0, c0 + BLOCK_SIZE_K], bar, pipe.more_v(i))
        if WAIT:
            if pid_m == first:
                done = gl.atomic_add(done_ptr, 0, sem="acquire")
                while done < wanted:
                    done = gl.atomic_add(done_ptr, 0, sem="acquire")
                fence = async_proxy_fence(done) * 0
        tma_load(u_desc, [m0 + fence, 0], bar, pipe.u(i))
        it += 1
    return it


@gluon.jit
def produce(
    sources, sync_ptr, pipe, schedule,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Draw work items and load what each of them needs, until none is left."""
    BLOCK_SIZE_M: gl.constexpr = sources.v.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = sources.v.block_type.shape[1]
    BLOCK_SIZE_N: gl.constexpr = sources.q.block_type.shape[1 if BACKWARD else 0]
    GROUP_SIZE_M: gl.constexpr = schedule.GROUP_SIZE_M
    ROWS: gl.constexpr = schedule.ROWS
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    blocks_m, steps = schedule.blocks_m, schedule.steps
    columns, rows_per_split = schedule.columns, schedule.rows_per_split
    groups = (blocks_m + GROUP_SIZE_M - 1) // GROUP_SIZE_M
    all_items = (blocks_m + ROWS - 1) // ROWS
    done_ptr = schedule.rank_items_done(sync_ptr)
    end = all_items + blocks_m * schedule.blocks_n + schedule.splits * columns
    it = 0
    t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
    next_t = t
    while t < end:
        place, kind = schedule.work_item(t)
        code = gl.full([1], 0, gl.int32, one) + place * 65536 + kind
        if kind == RANK_ITEM:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            m0 = place * ROWS * BLOCK_SIZE_M
            it = _load_rank_item(sources, pipe, it, code, m0, steps, BACKWARD)
        elif kind < COLUMN_ITEM:
            m0 = place * BLOCK_SIZE_M
            n0 = (kind - FIRST_TILE) * BLOCK_SIZE_N
            it, next_t = _load_tile(
                sources, pipe, it, code, m0, n0, steps, next_t, sync_ptr,
                schedule.flag(sync_ptr, place), RANK, BACKWARD,
            )  # fmt: skip
        elif COLUMNS:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            first = place * rows_per_split
            stop = min(first + rows_per_split, blocks_m)
            column = kind - COLUMN_ITEM
            group = first // GROUP_SIZE_M
            # dA waits for the rank items of its group. dB does not wait: its U is of the forward
            # pass.
            wanted = min(GROUP_SIZE_M // ROWS, all_items - group * (GROUP_SIZE_M // ROWS))
            if column < schedule.columns_b:
                it = _load_column_item(
                    sources.v, sources.kept, pipe, it, code, first, stop,
                    column * ROWS * BLOCK_SIZE_K, done_ptr + group, wanted, False,
                )  # fmt: skip
            else:
                c0 = (column - schedule.columns_b) * ROWS * BLOCK_SIZE_K
                it = _load_column_item(
                    sources.x, sources.u_rank, pipe, it, code, first, stop,
                    c0, done_ptr + group, wanted, True,
                )  # fmt: skip
        t = next_t
    i = pipe.wait_empty(it)
    pipe.work.index(i).store(gl.full([1], END, gl.int32, one))
    mbarrier.arrive(pipe.ready.index(i), count=1)
    # The last block to finish puts the counters back to 0 for the next launch.
    if gl.atomic_add(sync_ptr + EXITS, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.atomic_xchg(sync_ptr + DRAWN, 0, sem="relaxed")
        gl.atomic_xchg(sync_ptr + EXITS, 0, sem="relaxed")
        if COLUMNS:
            for group in range(groups):
                gl.atomic_xchg(done_ptr + group, 0, sem="relaxed")
