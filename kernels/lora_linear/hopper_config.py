"""The launch configuration of the sm_90 kernel; without Gluon, so that tables load without it."""

import triton

from ..runtime.tuned import LaunchConfig


def pitch_of(r: int) -> int:
    """From one row of a matrix of 16 bits with R columns to the next, as TMA needs it."""
    return triton.cdiv(r, 8) * 8


def rows_of_item(block_n: int, rank: int) -> int:
    """Blocks of rows of a rank item: what the kernel calls ROWS."""
    return 2 if block_n == 256 and rank <= 128 else 1


def hopper_config(M: int, N: int, rank: int, multiprocessors: int) -> dict:
    """Width of the tiles, stages of loading, blocks of rows of a group; ``rank`` is padded."""
    # The time that a tile of each width takes, measured in columns of the widest one: a narrow
    # tile loads more bytes for each product.
    tile = {256: 256, 128: 141, 64: 86}

    def cost(width):
        blocks_m = triton.cdiv(M, 128)
        # A rank item, of one or two blocks of rows, is bound by what it loads.
        items = triton.cdiv(blocks_m, rows_of_item(width, rank)) * (150 if width == 256 else 100)
        work = blocks_m * triton.cdiv(N, width) * tile[width] + items
        return triton.cdiv(work, multiprocessors * tile[width]) * tile[width]

    # Rank and column items have to fit the stages too.
    width = min((w for w in tile if w >= min(2 * rank, 256) or rank <= 32), key=cost)
    return dict(
        BLOCK_SIZE_M=128, BLOCK_SIZE_N=width, BLOCK_SIZE_K=64,
        STAGES={256: 3, 128: 5, 64: 7}[width], GROUP_SIZE_M=16,
    )  # fmt: skip


HOPPER = LaunchConfig(
    op="lora_linear_hopper",
    default=hopper_config,
    keys=("M", "N", "K", "rank", "backward"),
    entries=("BLOCK_SIZE_N", "STAGES", "GROUP_SIZE_M"),
    candidates=[
        {"BLOCK_SIZE_N": width, "STAGES": stages, "GROUP_SIZE_M": rows}
        for width, stages in ((256, 3), (128, 5), (128, 4))
        for rows in (4, 8, 16, 32)
    ],
)
