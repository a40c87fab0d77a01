"""What the producer and the consumer of the sm_90 kernel share: the order of work, and a pipeline.

`hopper.py` describes the kernel as a whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..runtime.gluon_compat import aggregate
from ..runtime.stages import wait_empty, wait_ready

# A work item is sent to the consumer as one number: 65536 times its place, plus its kind. The kind
# is RANK_ITEM; or FIRST_TILE plus the column of a tile; or COLUMN_ITEM plus the column of a column
# item. END says that there is no more work.
RANK_ITEM, FIRST_TILE, COLUMN_ITEM = (gl.constexpr(i) for i in (0, 1, 0x8000))


END = gl.constexpr(-1)


# Entries of the int32 array ``sync``: how many work items were drawn; how many blocks have
# finished; from FLAGS on a flag for each block of rows, then a count for each column item of a
# split, then for each group the number of its rank items that are done. Every launch leaves all of
# them at 0.
DRAWN, EXITS, FLAGS = (gl.constexpr(i) for i in range(3))


@aggregate
class Schedule:
    """The order of work. All sizes are counted in blocks."""

    blocks_m: gl.tensor  # blocks of rows
    blocks_n: gl.tensor  # tiles of a block of rows
    steps: gl.tensor  # K steps of a tile, and of a rank item
    columns: gl.tensor  # column items of a split: those of dB, then those of dA
    columns_b: gl.tensor  # column items of a split that make dB
    rows_per_split: gl.tensor  # blocks of rows that a split sums over
    splits: gl.tensor
    GROUP_SIZE_M: gl.constexpr  # blocks of rows of a group
    ROWS: gl.constexpr  # blocks of rows of a rank item; blocks of columns of a column item

    @gluon.jit
    def work_item(self, t):
        """(place, kind) of the t-th work item.

        The place of a rank item is pid_m // ROWS, of a tile pid_m, of a column item its split.

        Blocks of rows form groups, whose tiles share their operands in L2. First come the rank
        items of the first group; then, for each group, the rank items of the next group, its own
        tiles and its own column items.
        """
        GROUP_SIZE_M: gl.constexpr = self.GROUP_SIZE_M
        items = GROUP_SIZE_M // self.ROWS  # rank items of a whole group
        splits = GROUP_SIZE_M // self.rows_per_split
        all_items = (self.blocks_m + self.ROWS - 1) // self.ROWS
        last = (self.blocks_m - 1) // GROUP_SIZE_M
        first_of_last = all_items + last * (GROUP_SIZE_M * self.blocks_n + splits * self.columns)
        group = last
        rows = self.blocks_m - last * GROUP_SIZE_M
        ahead = 0
        u = t - first_of_last
        if t < first_of_last:
            size = items + GROUP_SIZE_M * self.blocks_n + splits * self.columns
            group = (t - items) // size
            rows = GROUP_SIZE_M
            ahead = min(items, all_items - (group + 1) * items)
            u = (t - items) % size
        place = t
        kind = 0
        if t >= min(items, all_items):
            if u < ahead:
                place = (group + 1) * items + u
            elif u < ahead + rows * self.blocks_n:
                place = group * GROUP_SIZE_M + (u - ahead) % rows
                kind = 1 + (u - ahead) // rows
            else:
                place = group * splits + (u - ahead - rows * self.blocks_n) // self.columns
                kind = 0x8000 + (u - ahead - rows * self.blocks_n) % self.columns
        return place, kind

    @gluon.jit
    def flag(self, sync_ptr, pid_m):
        """Address of the flag of a block of rows: how many tiles may still read its U (V)."""
        return sync_ptr + FLAGS + pid_m

    @gluon.jit
    def splits_done(self, sync_ptr, column):
        """Address of the count of finished splits of a column item."""
        return sync_ptr + FLAGS + self.blocks_m + column

    @gluon.jit
    def rank_items_done(self, sync_ptr):
        """Address of the counts of finished rank items, one for each group."""
        return sync_ptr + FLAGS + self.blocks_m + self.columns


@aggregate
class Pipeline:
    """STAGES stages of shared memory, which the producer fills and the consumer empties in turn.

    A tile takes a block of V and of Q from each stage. Rank and column items take ROWS blocks of V
    and one of P or U; the second block of V, and P or U, lie where a tile has its Q.
    """

    ready: gl.shared_memory_descriptor  # a barrier for each stage: it is filled
    empty: gl.shared_memory_descriptor  # a barrier for each stage: it may be filled again
    work: gl.shared_memory_descriptor  # the work item that begins in a stage
    v_bufs: gl.shared_memory_descriptor
    q_bufs: gl.shared_memory_descriptor
    more_v_bufs: gl.shared_memory_descriptor
    p_bufs: gl.shared_memory_descriptor
    u_bufs: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    ROWS: gl.constexpr

    @gluon.jit
    def wait_empty(self, it):
        """For the producer: the stage of iteration ``it``, once it may be filled."""
        return wait_empty(self.empty, it, self.STAGES)

    @gluon.jit
    def wait_ready(self, it):
        """For the consumer: the stage of iteration ``it``, once it is filled."""
        return wait_ready(self.ready, it, self.STAGES)

    @gluon.jit
    def more_v(self, i):
        """The second block of V of a rank or column item."""
        return self.more_v_bufs.index(2 * i)

    @gluon.jit
    def p(self, i):
        """The block of P of a rank item."""
        PER_STAGE: gl.constexpr = self.p_bufs.shape[0] // self.STAGES
        FIRST: gl.constexpr = PER_STAGE * (self.ROWS - 1) // 2  # behind the second block of V
        return self.p_bufs.index(i * PER_STAGE + FIRST)

    @gluon.jit
    def u(self, i):
        """The block of U of a column item."""
        PER_STAGE: gl.constexpr = self.u_bufs.shape[0] // self.STAGES
        FIRST: gl.constexpr = PER_STAGE * (self.ROWS - 1) // 2  # behind the second block of V
        return self.u_bufs.index(i * PER_STAGE + FIRST)


@gluon.jit
def async_proxy_fence(x):
    """Orders ordinary accesses to global memory with those of TMA. Returns x."""
    return gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.b32 $0, $1;", "=r,r", [x],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
