"""LoRA linear on sm_90: forward is one launch, and so is backward.

    forward   Y  = X W^T + bias + U B^T    U = s g (X A^T)
    backward  dX = dY W + V A              V = s g (dY B)      dB = dY^T U      dA = V^T X

A block multiplies with 8 warps (`hopper_multiply`) while one more warp fills their shared memory by
TMA (`hopper_load`). It draws its work from a counter:

- *rank items* read some rows of X (dY), publish their part of U (V) and raise a flag;
- *tiles* of Y (dX), to which U B^T (V A) is one more K step, or a few, taken once the flag of their
  rows is up. Rank items come a group of tiles early, so that hardly anyone waits;
- *column items* make some columns of dB and dA from the rows of a split. They move bytes while
  other blocks multiply; whoever finishes the last split of some columns adds them up.

Ranks above 64 leave dA and dB to cuBLAS: there they are products of a size that it is good at.

Work is drawn in order, so whoever is waited for is running already, whatever else is on the GPU.
All sums are in a fixed order: no float atomics.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .consumer import multiply
from .producer import load

COLUMN_ITEMS_RANK = 64  # up to which dA and dB are column items


NUM_WARPS = 8  # that multiply


@gluon.jit(
    do_not_specialize=[
        "scaling", "M", "N", "C", "R", "blocks_m", "blocks_n", "steps",
        "columns", "columns_b", "rows_per_split", "splits",
    ]
)  # fmt: skip
def _lora_linear_hopper_kernel(
    v_desc, q_desc, p_desc, e_desc, u_desc, u_rank_desc, kept_desc, x_desc, y_desc,
    u_ptr, s_ptr, gate_ptr, bias_ptr, db_ptr, da_ptr, part_ptr, sync_ptr,
    scaling, M, N, C, R, blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits,
    BACKWARD: gl.constexpr, COLUMNS: gl.constexpr, GATE_ENTRIES: gl.constexpr,
    STAGES: gl.constexpr, GROUP_SIZE_M: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Y (M, N) = V Q^T + bias + U E^T over C columns, U (M, R) = s g V P^T."""
    dtype: gl.constexpr = v_desc.dtype
    RANK: gl.constexpr = p_desc.block_type.shape[1 if BACKWARD else 0]
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    y_buf = gl.allocate_shared_memory(dtype, y_desc.block_type.shape, y_desc.layout)
    # Other work than tiles needs no Q. In its place lie, where there is room for it, the second of
    # two blocks of V, and then P or U.
    v_numel: gl.constexpr = v_bufs.shape[1] * v_bufs.shape[2]
    q_numel: gl.constexpr = q_bufs.shape[1] * q_bufs.shape[2]
    p_numel: gl.constexpr = p_desc.block_type.shape[0] * p_desc.block_type.shape[1]
    ROWS: gl.constexpr = 2 if q_numel >= 2 * v_numel and q_numel >= 2 * p_numel else 1
    more_v_bufs = v_bufs
    if ROWS == 2:
        more_v_bufs = q_bufs._reinterpret(
            dtype, [STAGES * q_numel // v_numel] + v_desc.block_type.shape, v_desc.layout
        )
    p_bufs = q_bufs._reinterpret(
        dtype, [STAGES * q_numel // p_numel] + p_desc.block_type.shape, p_desc.layout
    )
    u_bufs = p_bufs
    if COLUMNS:
        u_numel: gl.constexpr = kept_desc.block_type.shape[0] * kept_desc.block_type.shape[1]
        u_bufs = q_bufs._reinterpret(
            dtype, [STAGES * q_numel // u_numel] + kept_desc.block_type.shape, kept_desc.layout
        )
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    drawn = gl.allocate_shared_memory(gl.int32, [STAGES, 1], plain)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (multiply, (
            y_desc, u_ptr, s_ptr, gate_ptr, bias_ptr, db_ptr, da_ptr, part_ptr, sync_ptr,
            scaling, ready, empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs, y_buf,
            M, N, C, R, blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits,
            RANK, BACKWARD, COLUMNS, GATE_ENTRIES, STAGES, GROUP_SIZE_M, ROWS, NUM_WARPS,
        )),
        (load, (
            v_desc, q_desc, p_desc, e_desc, u_desc, u_rank_desc, kept_desc, x_desc, sync_ptr,
            ready, empty, drawn, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs,
            blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits,
            RANK, BACKWARD, COLUMNS, STAGES, GROUP_SIZE_M, ROWS,
        )),
    ], [1], [24])  # fmt: skip


# --------------------------------------------------------------- launch configuration


def hopper_config(M: int, N: int, rank: int, multiprocessors: int) -> dict:
    """Width of the tiles, stages of loading, rows of a group."""
    # Time of a tile, in columns of the widest one: narrower ones load more for each product.
    tile = {256: 256, 128: 141, 64: 86}

    def cost(width):
        blocks_m = triton.cdiv(M, 128)
        # A rank item, of one or two blocks of rows, is bound by what it loads.
        items = triton.cdiv(blocks_m, _rows(width, rank)) * (150 if width == 256 else 100)
        work = blocks_m * triton.cdiv(N, width) * tile[width] + items
        return triton.cdiv(work, multiprocessors * tile[width]) * tile[width]

    # Other work than tiles has to find room in the stages.
    width = min((w for w in tile if w >= min(2 * rank, 256) or rank <= 32), key=cost)
    return dict(
        BLOCK_SIZE_M=128, BLOCK_SIZE_N=width, BLOCK_SIZE_K=64,
        STAGES={256: 3, 128: 5, 64: 7}[width], GROUP_SIZE_M=16,
    )  # fmt: skip


def _rows(block_n: int, rank: int) -> int:
    """Blocks of rows of a rank item, as the kernel has it."""
    return 2 if block_n == 256 and rank <= 128 else 1
