"""The loading warp of the sm_90 kernel: the order of work, and all that TMA brings; see
`lora_linear_hopper` for the whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Places in the int32 array ``sync``, which every launch leaves at 0: work drawn, blocks that are
# done, rank items done; then a flag for each block of rows and a count for each column item.
DRAWN, EXITS, RANKS, FLAGS = (gl.constexpr(i) for i in range(4))
# A piece of work in one number: 65536 times its place, plus its kind, or the column of a tile.
RANK_ITEM, FIRST_TILE, SUM_ITEM, COLUMN_ITEM = (gl.constexpr(i) for i in (0, 1, 0xFFFE, 0xFFFF))
END = gl.constexpr(-1)


@gluon.jit
def work_of(t, blocks_m, blocks_n, sums, GROUP_SIZE_M, ROWS):
    """The t-th piece of work: of rank items the place is pid_m // ROWS, of tiles pid_m.

    Rows in groups, whose tiles share their operands in L2: the rank items of the first group, then
    for each group the rank items of the next one and its own tiles. Then sums, then column items.
    """
    items = GROUP_SIZE_M // ROWS  # of a whole group
    all_items = (blocks_m + ROWS - 1) // ROWS
    last = (blocks_m - 1) // GROUP_SIZE_M
    first_of_last = all_items + last * GROUP_SIZE_M * blocks_n
    first_sum = all_items + blocks_m * blocks_n
    place = t
    kind = 0
    if t >= first_sum + sums:
        place = t - first_sum - sums
        kind = 0xFFFF
    elif t >= first_sum:
        place = t - first_sum
        kind = 0xFFFE
    elif t >= first_of_last:
        rows = blocks_m - last * GROUP_SIZE_M
        place = last * GROUP_SIZE_M + (t - first_of_last) % rows
        kind = 1 + (t - first_of_last) // rows
    elif t >= items:
        group = (t - items) // (items + GROUP_SIZE_M * blocks_n)
        u = (t - items) % (items + GROUP_SIZE_M * blocks_n)
        ahead = min(items, all_items - (group + 1) * items)
        if u < ahead:
            place = (group + 1) * items + u
        else:
            place = group * GROUP_SIZE_M + (u - ahead) % GROUP_SIZE_M
            kind = 1 + (u - ahead) // GROUP_SIZE_M
    return place, kind


@gluon.jit
def async_proxy_fence(x):
    """Orders ordinary accesses to global memory with those of TMA. Returns x."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [x],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def load(
    v_desc, q_desc, p_desc, e_desc, u_desc, u_rank_desc, kept_desc, x_desc, sync_ptr,
    ready, empty, kept_ready, kept_empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs,
    kept_bufs, blocks_m, blocks_n, steps, sums, blocks_c, column_items, rows_per_split,
    BACKWARD: gl.constexpr, STAGES: gl.constexpr, GROUP_SIZE_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    BLOCK_SIZE_M: gl.constexpr = v_desc.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = v_desc.block_type.shape[1]
    BLOCK_SIZE_N: gl.constexpr = q_desc.block_type.shape[1 if BACKWARD else 0]
    # Of the stages' room for Q, rank and column items take the first half for rows, if ROWS is 2.
    P_PER_STAGE: gl.constexpr = p_bufs.shape[0] // STAGES
    FIRST_P: gl.constexpr = P_PER_STAGE * (ROWS - 1) // 2
    U_PER_STAGE: gl.constexpr = u_bufs.shape[0] // STAGES
    FIRST_U: gl.constexpr = U_PER_STAGE * (ROWS - 1) // 2
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    all_items = (blocks_m + ROWS - 1) // ROWS
    end = all_items + blocks_m * blocks_n + sums + column_items
    it = 0
    kept = 0
    ranks = 0  # known to be done
    t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
    next_t = t
    while t < end:
        place, kind = work_of(t, blocks_m, blocks_n, sums, GROUP_SIZE_M, ROWS)
        code = gl.full([1], 0, gl.int32, one) + place * 65536 + kind
        if kind == RANK_ITEM:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            m0 = place * ROWS * BLOCK_SIZE_M
            if BACKWARD:
                mbarrier.wait(kept_empty, (kept & 1) ^ 1)
                mbarrier.expect(kept_ready, ROWS * kept_desc.block_type.nbytes)
                for c in gl.static_range(ROWS):
                    tma.async_copy_global_to_shared(
                        kept_desc, [m0 + c * BLOCK_SIZE_M, 0], kept_ready, kept_bufs.index(c)
                    )
                kept += 1
            for k in range(steps):
                i = it % STAGES
                mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
                if k == 0:  # which work it is goes with its first step
                    drawn.index(i).store(code)
                k0 = k * BLOCK_SIZE_K
                bar = ready.index(i)
                mbarrier.expect(bar, ROWS * v_desc.block_type.nbytes + p_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(v_desc, [m0, k0], bar, v_bufs.index(i))
                if ROWS == 2:
                    tma.async_copy_global_to_shared(
                        v_desc, [m0 + BLOCK_SIZE_M, k0], bar, more_v_bufs.index(2 * i)
                    )
                p = p_bufs.index(i * P_PER_STAGE + FIRST_P)
                if BACKWARD:
                    tma.async_copy_global_to_shared(p_desc, [k0, 0], bar, p)
                else:
                    tma.async_copy_global_to_shared(p_desc, [0, k0], bar, p)
                it += 1
        elif kind < SUM_ITEM:
            m0 = place * BLOCK_SIZE_M
            n0 = (kind - FIRST_TILE) * BLOCK_SIZE_N
            flag_ptr = sync_ptr + FLAGS + place
            up = 0
            for k in range(steps):
                i = it % STAGES
                mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
                if k == 0:
                    drawn.index(i).store(code)
                k0 = k * BLOCK_SIZE_K
                bar = ready.index(i)
                mbarrier.expect(bar, v_desc.block_type.nbytes + q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(v_desc, [m0, k0], bar, v_bufs.index(i))
                if BACKWARD:
                    tma.async_copy_global_to_shared(q_desc, [k0, n0], bar, q_bufs.index(i))
                else:
                    tma.async_copy_global_to_shared(q_desc, [n0, k0], bar, q_bufs.index(i))
                it += 1
                # Answers from memory take a while: asked for while there is a stock of stages.
                if k == steps // 4:
                    next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
                if k == steps // 2:
                    up = gl.atomic_add(flag_ptr, 0, sem="acquire")
            # The low-rank step.
            while up == 0:
                up = gl.atomic_add(flag_ptr, 0, sem="acquire")
            gl.atomic_add(flag_ptr, -1, sem="relaxed")  # the last reader leaves it down
            m0 += async_proxy_fence(up) * 0
            i = it % STAGES
            mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
            bar = ready.index(i)
            mbarrier.expect(bar, u_desc.block_type.nbytes + e_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(u_desc, [m0, 0], bar, v_bufs.index(i))
            if BACKWARD:
                tma.async_copy_global_to_shared(e_desc, [0, n0], bar, q_bufs.index(i))
            else:
                tma.async_copy_global_to_shared(e_desc, [n0, 0], bar, q_bufs.index(i))
            it += 1
        elif BACKWARD:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            while ranks < all_items:
                ranks = gl.atomic_add(sync_ptr + RANKS, 0, sem="acquire")
            first = async_proxy_fence(ranks) * 0
            if kind == SUM_ITEM:  # nothing that TMA could do
                i = it % STAGES
                mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
                drawn.index(i).store(code)
                mbarrier.arrive(ready.index(i), count=1)
                it += 1
            else:
                first += place // blocks_c * rows_per_split
                c0 = place % blocks_c * ROWS * BLOCK_SIZE_K
                for pid_m in range(first, min(first + rows_per_split, blocks_m)):
                    i = it % STAGES
                    mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
                    if pid_m == first:
                        drawn.index(i).store(code)
                    m0 = pid_m * BLOCK_SIZE_M
                    bar = ready.index(i)
                    mbarrier.expect(
                        bar, ROWS * x_desc.block_type.nbytes + u_rank_desc.block_type.nbytes
                    )
                    tma.async_copy_global_to_shared(x_desc, [m0, c0], bar, v_bufs.index(i))
                    if ROWS == 2:
                        tma.async_copy_global_to_shared(
                            x_desc, [m0, c0 + BLOCK_SIZE_K], bar, more_v_bufs.index(2 * i)
                        )
                    u = u_bufs.index(i * U_PER_STAGE + FIRST_U)
                    tma.async_copy_global_to_shared(u_rank_desc, [m0, 0], bar, u)
                    it += 1
        t = next_t
    i = it % STAGES
    mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
    drawn.index(i).store(gl.full([1], END, gl.int32, one))
    mbarrier.arrive(ready.index(i), count=1)
    # The last block to come here puts the counters back for the next launch.
    if gl.atomic_add(sync_ptr + EXITS, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.atomic_xchg(sync_ptr + DRAWN, 0, sem="relaxed")
        gl.atomic_xchg(sync_ptr + EXITS, 0, sem="relaxed")
        gl.atomic_xchg(sync_ptr + RANKS, 0, sem="relaxed")
