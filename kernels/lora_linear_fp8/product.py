"""A product of FP8 matrices with scales, plus a low-rank term in 16 bits, on sm_90.

    Y (M, N) = (V sv) (Q sq)^T + bias + U E^T

V (M, C), Q (N, C) are e4m3 and U (M, R), E (N, R) of 16 bits. The tensor cores of sm_90 keep too
few bits of a long sum of FP8 products. Hence a sum goes over STEPS_PER_SCALE steps of 128 columns,
for which V has one scale in each row; then float32 registers take it up, multiplied by that scale.
With one step to a scale, Q has a scale for each block of 128 x 128. With more, Q has one for all of
it, or one for each row. The low-rank term is one more step of the same sum.

In each block of threads, three groups of 4 warps multiply 64 rows of a tile each, so that others
keep the tensor cores busy while one takes up its sums. One more warp loads by TMA.
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

from ..runtime.gluon_compat import aggregate, optional, reinterpret, tma_load, tma_store
from ..runtime.stages import wait_empty, wait_ready

GROUPS = 3  # of 4 warps that multiply
ROWS = 64  # of a tile that such a group multiplies
COLUMNS = 128  # of a tile


@aggregate
class Scales:
    """Where the scales lie."""

    v_ptr: gl.tensor  # (C / (128 STEPS_PER_SCALE), M)
    q_ptr: optional  # of the blocks of Q, or one for all of Q
    row_ptr: optional  # (N,), of the rows of Q
    stride_v: gl.tensor
    stride_qn: gl.tensor  # from 128 rows of Q to the next
    stride_qc: gl.tensor  # from 128 columns of Q to the next


@aggregate
class Tiles:
    """The order of the tiles: groups of blocks of rows, whose operands stay in L2."""

    blocks_m: gl.tensor
    blocks_n: gl.tensor
    GROUP_SIZE_M: gl.constexpr

    @gluon.jit
    def place(self, t):
        """The block of rows and the block of columns of the t-th tile."""
        width = self.GROUP_SIZE_M * self.blocks_n
        first = t // width * self.GROUP_SIZE_M
        rows = min(self.blocks_m - first, self.GROUP_SIZE_M)
        return first + t % width % rows, t % width // rows


@aggregate
class Pipeline:
    """STAGES stages of shared memory, which the producer fills and the consumers empty in turn."""

    ready: gl.shared_memory_descriptor  # a barrier for each stage: it is filled
    empty: gl.shared_memory_descriptor  # a barrier for each stage: all groups are done with it
    v_bufs: gl.shared_memory_descriptor  # GROUPS for each stage
    q_bufs: gl.shared_memory_descriptor
    u_bufs: gl.shared_memory_descriptor  # the memory of v_bufs, for U
    e_bufs: gl.shared_memory_descriptor  # the memory of q_bufs, for E
    STAGES: gl.constexpr
    GROUPS: gl.constexpr

    @gluon.jit
    def wait_empty(self, it):
        """For the producer: the stage of iteration ``it``, once it may be filled."""
        return wait_empty(self.empty, it, self.STAGES)

    @gluon.jit
    def wait_ready(self, it):
        """For a consumer: the stage of iteration ``it``, once it is filled."""
        return wait_ready(self.ready, it, self.STAGES)

    @gluon.jit
    def done_before(self, it, condition):
        """For a consumer: the stage before that of iteration ``it`` may be filled again."""
        i = (it + self.STAGES - 1) % self.STAGES
        mbarrier.arrive(self.empty.index(i), count=1, pred=condition)


@gluon.jit
def _load_stage(pipe, it, v_desc, v_bufs, q_desc, q_bufs, m0, c0, q_row, q_column):
    """Fill the stage of iteration ``it`` with the rows of all groups and a block of Q."""
    GROUPS: gl.constexpr = pipe.GROUPS
    ROWS: gl.constexpr = v_desc.block_type.shape[0]
    i = pipe.wait_empty(it)
    bar = pipe.ready.index(i)
    mbarrier.expect(bar, GROUPS * v_desc.block_type.nbytes + q_desc.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        tma_load(v_desc, [m0 + group * ROWS, c0], bar, v_bufs.index(i * GROUPS + group))
    tma_load(q_desc, [q_row, q_column], bar, q_bufs.index(i))


@gluon.jit
def _produce(
    v_desc, q_desc, u_desc, e_desc, pipe, tiles, steps, rank_steps, TRANSPOSED: gl.constexpr
):  # fmt: skip
    """Load what each tile of this block of threads needs, one tile after the other."""
    STEP: gl.constexpr = v_desc.block_type.shape[1]
    RANKS: gl.constexpr = u_desc.block_type.shape[1]
    it = 0
    for t in range(gl.program_id(0), tiles.blocks_m * tiles.blocks_n, gl.num_programs(0)):
        pid_m, pid_n = tiles.place(t)
        m0 = pid_m * pipe.GROUPS * v_desc.block_type.shape[0]
        n0 = pid_n * q_desc.block_type.shape[0]
        for k in range(steps):
            c0 = k * STEP
            _load_stage(pipe, it, v_desc, pipe.v_bufs, q_desc, pipe.q_bufs, m0, c0, n0, c0)
            it += 1
        for k in range(rank_steps):
            r0 = k * RANKS
            if TRANSPOSED:
                _load_stage(pipe, it, u_desc, pipe.u_bufs, e_desc, pipe.e_bufs, m0, r0, r0, n0)
            else:
                _load_stage(pipe, it, u_desc, pipe.u_bufs, e_desc, pipe.e_bufs, m0, r0, n0, r0)
            it += 1


@gluon.jit
def _scales_of_step(scales, v_ptrs, q_ptr, k, last, mask_m):
    """sv and sq of the k-th step."""
    k = min(k, last)
    sv = gl.load(v_ptrs + k * scales.stride_v, mask=mask_m, other=0.0)
    return sv, gl.load(q_ptr + k * scales.stride_qc)


@gluon.jit
def _operands(pipe, i, GROUP: gl.constexpr):
    """The rows of a group, and Q^T, in a stage."""
    return pipe.v_bufs.index(i * pipe.GROUPS + GROUP), pipe.q_bufs.index(i).permute((1, 0))


@gluon.jit
def _add_step(acc, pipe, it, sv, sq, GROUP: gl.constexpr):
    """acc + (V sv) (Q sq)^T over the columns of one stage."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1], 32])
    i = pipe.wait_ready(it)
    part = gl.zeros(acc.shape, gl.float32, layout)
    v, q = _operands(pipe, i, GROUP)
    part = warpgroup_mma(v, q, part, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, (part,))
    mbarrier.arrive(pipe.empty.index(i), count=1)
    return acc + gl.convert_layout(part, acc.type.layout) * (sv * sq)[:, None]


@gluon.jit
def _add_steps(acc, pipe, it, count, sv, GROUP: gl.constexpr):
    """acc + (V sv) Q^T over the columns of ``count`` stages, which share their scales."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1], 32])
    part = gl.zeros(acc.shape, gl.float32, layout)
    for k in range(count):
        i = pipe.wait_ready(it)
        v, q = _operands(pipe, i, GROUP)
        part = warpgroup_mma(v, q, part, use_acc=k > 0, is_async=True)
        part = warpgroup_mma_wait(1, (part,))
        pipe.done_before(it, k > 0)
        it += 1
    part = warpgroup_mma_wait(0, (part,))
    pipe.done_before(it, True)
    return acc + gl.convert_layout(part, acc.type.layout) * sv[:, None]


@gluon.jit
def _consume(
    scales, y_desc, y_bufs, bias_ptr, pipe, tiles, M, N, steps, rank_steps,
    GROUP: gl.constexpr, TRANSPOSED: gl.constexpr, RANKS: gl.constexpr,
    STEPS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """Compute the rows of a group in each tile of this block of threads."""
    ROWS: gl.constexpr = pipe.v_bufs.shape[1]
    COLUMNS: gl.constexpr = pipe.q_bufs.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    y_buf = y_bufs.index(GROUP)
    it = 0
    for t in range(gl.program_id(0), tiles.blocks_m * tiles.blocks_n, gl.num_programs(0)):
        pid_m, pid_n = tiles.place(t)
        m0 = (pid_m * pipe.GROUPS + GROUP) * ROWS
        offs_m = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        mask_m = offs_m < M
        v_ptrs = scales.v_ptr + offs_m
        acc = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        if STEPS_PER_SCALE == 1:
            # The scales of a step are loaded three steps ahead. They go around four pairs of
            # variables: a copy from one variable to the next would wait for the load.
            q_ptr, last = scales.q_ptr + pid_n * scales.stride_qn, steps - 1
            v0, q0 = _scales_of_step(scales, v_ptrs, q_ptr, 0, last, mask_m)
            v1, q1 = _scales_of_step(scales, v_ptrs, q_ptr, 1, last, mask_m)
            v2, q2 = _scales_of_step(scales, v_ptrs, q_ptr, 2, last, mask_m)
            for k in range(0, steps, 4):
                v3, q3 = _scales_of_step(scales, v_ptrs, q_ptr, k + 3, last, mask_m)
                acc = _add_step(acc, pipe, it + k, v0, q0, GROUP)
                v0, q0 = _scales_of_step(scales, v_ptrs, q_ptr, k + 4, last, mask_m)
                if k + 1 < steps:
                    acc = _add_step(acc, pipe, it + k + 1, v1, q1, GROUP)
                v1, q1 = _scales_of_step(scales, v_ptrs, q_ptr, k + 5, last, mask_m)
                if k + 2 < steps:
                    acc = _add_step(acc, pipe, it + k + 2, v2, q2, GROUP)
                v2, q2 = _scales_of_step(scales, v_ptrs, q_ptr, k + 6, last, mask_m)
                if k + 3 < steps:
                    acc = _add_step(acc, pipe, it + k + 3, v3, q3, GROUP)
        else:
            for k in range(0, steps, STEPS_PER_SCALE):
                place = k // STEPS_PER_SCALE * scales.stride_v
                sv = gl.load(v_ptrs + place, mask=mask_m, other=0.0)
                count = min(STEPS_PER_SCALE, steps - k)
                acc = _add_steps(acc, pipe, it + k, count, sv, GROUP)
            if scales.q_ptr is not None:
                acc *= gl.load(scales.q_ptr)
        it += steps
        offs_n = pid_n * COLUMNS + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        if scales.row_ptr is not None:
            acc *= gl.load(scales.row_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
            acc += bias.to(gl.float32)[None, :]
        for _ in range(rank_steps):
            i = pipe.wait_ready(it)
            u = pipe.u_bufs.index(i * pipe.GROUPS + GROUP).slice(0, RANKS, dim=1)
            if TRANSPOSED:
                e = pipe.e_bufs.index(i).slice(0, RANKS, dim=0)
            else:
                e = pipe.e_bufs.index(i).slice(0, RANKS, dim=1).permute((1, 0))
            acc = warpgroup_mma(u, e, acc, is_async=True)
            acc = warpgroup_mma_wait(0, (acc,))
            mbarrier.arrive(pipe.empty.index(i), count=1)
            it += 1
        tma.store_wait(0)
        y_buf.store(acc.to(y_desc.dtype))
        fence_async_shared()
        tma_store(y_desc, [m0, pid_n * COLUMNS], y_buf)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "M", "N", "steps", "rank_steps", "blocks_m", "blocks_n", "stride_v", "stride_qn",
        "stride_qc",
    ]
)  # fmt: skip
def fp8_product_kernel(
    v_desc, q_desc, u_desc, e_desc, y_desc, v_scale_ptr, q_scale_ptr, row_scale_ptr, bias_ptr,
    stride_v, stride_qn, stride_qc, M, N, steps, rank_steps, blocks_m, blocks_n,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, GROUP_SIZE_M: gl.constexpr,
    TRANSPOSED: gl.constexpr, RANKS: gl.constexpr, STEPS_PER_SCALE: gl.constexpr,
):  # fmt: skip
    """Y (M, N) = (V sv) (Q sq)^T + bias + U E^T, for GROUPS = 3.

    E is given as (R, N) where TRANSPOSED. A step has up to 64 ranks, padded to RANKS.
    """
    dtype: gl.constexpr = y_desc.dtype
    v_block: gl.constexpr = v_desc.block_type.shape
    q_block: gl.constexpr = q_desc.block_type.shape
    v_bufs = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES * GROUPS] + v_block, v_desc.layout
    )  # fmt: skip
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_block, q_desc.layout)
    u_bufs = reinterpret(v_bufs, dtype, [STAGES * GROUPS] + u_desc.block_type.shape, u_desc.layout)
    e_bufs = reinterpret(q_bufs, dtype, [STAGES] + e_desc.block_type.shape, e_desc.layout)
    y_bufs = gl.allocate_shared_memory(dtype, [GROUPS] + y_desc.block_type.shape, y_desc.layout)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    fence_async_shared()
    scales = Scales(v_scale_ptr, q_scale_ptr, row_scale_ptr, stride_v, stride_qn, stride_qc)
    tiles = Tiles(blocks_m, blocks_n, GROUP_SIZE_M)
    pipe = Pipeline(ready, empty, v_bufs, q_bufs, u_bufs, e_bufs, STAGES, GROUPS)
    gl.warp_specialize([
        (_consume, (scales, y_desc, y_bufs, bias_ptr, pipe, tiles, M, N, steps, rank_steps,
                    0, TRANSPOSED, RANKS, STEPS_PER_SCALE)),
        (_consume, (scales, y_desc, y_bufs, bias_ptr, pipe, tiles, M, N, steps, rank_steps,
                    1, TRANSPOSED, RANKS, STEPS_PER_SCALE)),
        (_consume, (scales, y_desc, y_bufs, bias_ptr, pipe, tiles, M, N, steps, rank_steps,
                    2, TRANSPOSED, RANKS, STEPS_PER_SCALE)),
        (_produce, (v_desc, q_desc, u_desc, e_desc, pipe, tiles, steps, rank_steps, TRANSPOSED)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip
