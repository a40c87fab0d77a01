"""LoRA linear on sm_90: forward is one launch, and so is backward.

    forward   Y  = X W^T + bias + U B^T    U = s g (X A^T)
    backward  dX = dY W + V A              V = s g (dY B)      dB = dY^T U      dA = V^T X

The code has one set of names for both passes: Y = V Q^T + bias + U E^T with U = s g V P^T. In the
backward pass its V, Q, P, E, U and Y are dY, W^T, B^T, A^T, the V above, and dX.

In each block of threads, 8 warps multiply (`consumer.py`) while one more warp fills their shared
memory by TMA (`producer.py`). The block draws its work items from a counter (`schedule.py`):

- *rank items* read some rows of X (dY), publish their part of U (V) and raise a flag;
- *tiles* of Y (dX) take U B^T (V A) as one more K step, or a few, once the flag of their rows is
  up. Rank items are drawn a group of tiles ahead, so that hardly any tile waits;
- *column items* compute some columns of dB and dA from the rows of a split. They move bytes while
  other blocks multiply; the block that finishes the last split of some columns adds the splits up.

Above COLUMN_ITEMS_RANK, cuBLAS computes dA and dB: at such ranks they are products of a size that
it is good at.

Work items are drawn in order. Thus a block only ever waits for work that is already running,
whatever else is on the GPU. All sums are in a fixed order: there are no float atomics.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..runtime.gluon_compat import reinterpret
from .consumer import Problem, Results, consume
from .producer import Sources, produce
from .schedule import Pipeline, Schedule

COLUMN_ITEMS_RANK = 64  # the largest padded rank at which dA and dB are column items
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
    # Rank and column items need no Q. They use its buffers for a second block of V, if it fits,
    # and behind that for P or U.
    v_numel: gl.constexpr = v_bufs.shape[1] * v_bufs.shape[2]
    q_numel: gl.constexpr = q_bufs.shape[1] * q_bufs.shape[2]
    p_numel: gl.constexpr = p_desc.block_type.shape[0] * p_desc.block_type.shape[1]
    ROWS: gl.constexpr = 2 if q_numel >= 2 * v_numel and q_numel >= 2 * p_numel else 1
    more_v_bufs = v_bufs
    if ROWS == 2:
        more_v_bufs = reinterpret(
            q_bufs, dtype, [STAGES * q_numel // v_numel] + v_desc.block_type.shape, v_desc.layout
        )
    p_bufs = reinterpret(
        q_bufs, dtype, [STAGES * q_numel // p_numel] + p_desc.block_type.shape, p_desc.layout
    )
    u_bufs = p_bufs
    if COLUMNS:
        u_numel: gl.constexpr = kept_desc.block_type.shape[0] * kept_desc.block_type.shape[1]
        u_bufs = reinterpret(
            q_bufs,
            dtype,
            [STAGES * q_numel // u_numel] + kept_desc.block_type.shape,
            kept_desc.layout,
        )
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    work = gl.allocate_shared_memory(gl.int32, [STAGES, 1], plain)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    sources = Sources(v_desc, q_desc, p_desc, e_desc, u_desc, u_rank_desc, kept_desc, x_desc)
    results = Results(y_desc, y_buf, u_ptr, s_ptr, db_ptr, da_ptr, part_ptr)
    problem = Problem(
        M, N, C, R, scaling, gate_ptr, bias_ptr, RANK, BACKWARD, COLUMNS, GATE_ENTRIES, NUM_WARPS
    )  # fmt: skip
    pipe = Pipeline(
        ready, empty, work, v_bufs, q_bufs, more_v_bufs, p_bufs, u_bufs, STAGES, ROWS
    )  # fmt: skip
    schedule = Schedule(
        blocks_m, blocks_n, steps, columns, columns_b, rows_per_split, splits, GROUP_SIZE_M, ROWS
    )  # fmt: skip
    gl.warp_specialize([
        (consume, (problem, results, sync_ptr, pipe, schedule)),
        (produce, (sources, sync_ptr, pipe, schedule, RANK, BACKWARD, COLUMNS)),
    ], [1], [24])  # fmt: skip
