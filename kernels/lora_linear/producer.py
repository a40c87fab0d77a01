"""The loading warp of the sm_90 kernel: the order of work, and all that TMA brings; see
`lora_linear_hopper` for the whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Places in the int32 array ``sync``, which every launch leaves at 0: work drawn, blocks that are
# done; then a flag for each block of rows, a count for each column item of a split, and the rank
# items that are done of each group.
DRAWN, EXITS, FLAGS = (gl.constexpr(i) for i in range(3))


# A piece of work in one number: 65536 times its place, plus its kind: a rank item, 1 and the column
# of a tile, or COLUMN_ITEM and the column of a column item.
RANK_ITEM, FIRST_TILE, COLUMN_ITEM = (gl.constexpr(i) for i in (0, 1, 0x8000))


END = gl.constexpr(-1)


@gluon.jit
def work_of(t, blocks_m, blocks_n, columns, rows_per_split, GROUP_SIZE_M, ROWS):
    """The t-th piece of work; the place of a rank item is pid_m // ROWS, of a tile pid_m, of a
    column item the number of its split.

    Rows in groups, whose tiles share their operands in L2. First the rank items of the first group;
    then for each group the rank items of the next one, its own tiles, its own column items.
    """
    items = GROUP_SIZE_M // ROWS  # of a whole group
    splits = GROUP_SIZE_M // rows_per_split
    all_items = (blocks_m + ROWS - 1) // ROWS
    last = (blocks_m - 1) // GROUP_SIZE_M
    first_of_last = all_items + last * (GROUP_SIZE_M * blocks_n + splits * columns)
    group = last
    rows = blocks_m - last * GROUP_SIZE_M
    ahead = 0
    u = t - first_of_last
    if t < first_of_last:
        size = items + GROUP_SIZE_M * blocks_n + splits * columns
        group = (t - items) // size
        rows = GROUP_SIZE_M
        ahead = min(items, all_items - (group + 1) * items)
        u = (t - items) % size
    place = t
    kind = 0
    if t >= min(items, all_items):
        if u < ahead:
            place = (group + 1) * items + u
        elif u < ahead + rows * blocks_n:
            place = group * GROUP_SIZE_M + (u - ahead) % rows
            kind = 1 + (u - ahead) // rows
        else:
            place = group * splits + (u - ahead - rows * blocks_n) // columns
            kind = 0x8000 + (u - ahead - rows * blocks_n) % columns
    return place, kind


@gluon.jit
def async_proxy_fence(x):
    """Orders ordinary accesses to global memory with those of TMA. Returns x."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [x],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_columns(
    desc, u_desc, it, code, first, end, c0, done_ptr, wanted,
    ready, empty, drawn, v_bufs, more_v_bufs, u_bufs,
    WAIT: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """ROWS blocks of columns of a matrix, from c0 on, and the rank matrix that multiplies them."""
    BLOCK_SIZE_M: gl.constexpr = desc.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = desc.block_type.shape[1]
    U_PER_STAGE: gl.constexpr = u_bufs.shape[0] // STAGES
    FIRST_U: gl.constexpr = U_PER_STAGE * (ROWS - 1) // 2
    fence = 0
    for pid_m in range(first, end):
        i = it % STAGES
        mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
        if pid_m == first:
            drawn.index(i).store(code)
        m0 = pid_m * BLOCK_SIZE_M
        bar = ready.index(i)
        mbarrier.expect(bar, ROWS * desc.block_type.nbytes + u_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [m0, c0], bar, v_bufs.index(i))
        if ROWS == 2:
            more_v = more_v_bufs.index(2 * i)
            tma.async_copy_global_to_shared(desc, [m0, c0 + BLOCK_SIZE_K], bar, more_v)
        if WAIT:
            if pid_m == first:
                done = gl.atomic_add(done_ptr, 0, sem="acquire")
                while done < wanted:
                    done = gl.atomic_add(done_ptr, 0, sem="acquire")
                fence = async_proxy_fence(done) * 0
        u = u_bufs.index(i * U_PER_STAGE + FIRST_U)
        tma.async_copy_global_to_shared(u_desc, [m0 + fence, 0], bar, u)
        it += 1
    return it


@gluon.jit
def load(
    v_desc, q_desc, p_desc, e_desc, u_desc, u_rank_desc, kept_desc, x_desc, sync_ptr,
    ready, empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs,
    blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits,
    RANK: gl.constexpr, BACKWARD: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    GROUP_SIZE_M: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    BLOCK_SIZE_M: gl.constexpr = v_desc.block_type.shape[0]
    BLOCK_SIZE_K: gl.constexpr = v_desc.block_type.shape[1]
    BLOCK_SIZE_N: gl.constexpr = q_desc.block_type.shape[1 if BACKWARD else 0]
    # Of the stages' room for Q, rank and column items take the first half for rows, if ROWS is 2.
    P_PER_STAGE: gl.constexpr = p_bufs.shape[0] // STAGES
    FIRST_P: gl.constexpr = P_PER_STAGE * (ROWS - 1) // 2
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    groups = (blocks_m + GROUP_SIZE_M - 1) // GROUP_SIZE_M
    all_items = (blocks_m + ROWS - 1) // ROWS
    done_ptr = sync_ptr + FLAGS + blocks_m + columns
    end = all_items + blocks_m * blocks_n + splits * columns
    it = 0
    t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
    next_t = t
    while t < end:
        place, kind = work_of(t, blocks_m, blocks_n, columns, rows_per_split, GROUP_SIZE_M, ROWS)
        code = gl.full([1], 0, gl.int32, one) + place * 65536 + kind
        if kind == RANK_ITEM:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            m0 = place * ROWS * BLOCK_SIZE_M
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
        elif kind < COLUMN_ITEM:
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
            # The low-rank steps.
            while up == 0:
                up = gl.atomic_add(flag_ptr, 0, sem="acquire")
            gl.atomic_add(flag_ptr, -1, sem="relaxed")  # the last reader leaves it down
            m0 += async_proxy_fence(up) * 0
            for r0 in gl.static_range(0, RANK, BLOCK_SIZE_K):
                i = it % STAGES
                mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
                bar = ready.index(i)
                mbarrier.expect(bar, u_desc.block_type.nbytes + e_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(u_desc, [m0, r0], bar, v_bufs.index(i))
                if BACKWARD:
                    tma.async_copy_global_to_shared(e_desc, [r0, n0], bar, q_bufs.index(i))
                else:
                    tma.async_copy_global_to_shared(e_desc, [n0, r0], bar, q_bufs.index(i))
                it += 1
        elif COLUMNS:
            next_t = gl.atomic_add(sync_ptr + DRAWN, 1, sem="relaxed")
            first = place * rows_per_split
            stop = min(first + rows_per_split, blocks_m)
            column = kind - COLUMN_ITEM
            group = first // GROUP_SIZE_M
            # The rank items of this group; U for dB is there since the forward pass.
            wanted = min(GROUP_SIZE_M // ROWS, all_items - group * (GROUP_SIZE_M // ROWS))
            if column < columns_b:
                it = _load_columns(
                    v_desc, kept_desc, it, code, first, stop, column * ROWS * BLOCK_SIZE_K,
                    done_ptr + group, wanted, ready, empty, drawn, v_bufs, more_v_bufs, u_bufs,
                    False, STAGES, ROWS,
                )  # fmt: skip
            else:
                c0 = (column - columns_b) * ROWS * BLOCK_SIZE_K
                it = _load_columns(
                    x_desc, u_rank_desc, it, code, first, stop, c0,
                    done_ptr + group, wanted, ready, empty, drawn, v_bufs, more_v_bufs, u_bufs,
                    True, STAGES, ROWS,
                )  # fmt: skip
        t = next_t
    i = it % STAGES
    mbarrier.wait(empty.index(i), ((it // STAGES) & 1) ^ 1)
    drawn.index(i).store(gl.full([1], END, gl.int32, one))
    mbarrier.arrive(ready.index(i), count=1)
    # The last block to come here puts the counters back for the next launch.
    if gl.atomic_add(sync_ptr + EXITS, 1, sem="relaxed") == gl.num_programs(0) - 1:
        gl.atomic_xchg(sync_ptr + DRAWN, 0, sem="relaxed")
        gl.atomic_xchg(sync_ptr + EXITS, 0, sem="relaxed")
        if COLUMNS:
            for group in range(groups):
                gl.atomic_xchg(done_ptr + group, 0, sem="relaxed")
