"""The launch configurations of the portable kernels.

The number of parts that a sum is split into, ``splits``, depends on sizes alone. Thus results are
rounded in the same way on every GPU.
"""

import triton

from ..runtime.tuned import LaunchConfig, combinations

PROGRAMS = 256  # enough to fill a GPU about twice


def down_config(M: int, K: int, R: int, itemsize: int) -> dict:
    """Blocks, warps, stages and the number of parts that K is split into."""
    block_m = 16 if M <= 16 else 32 if M <= 1024 else 64
    block_r = min(64 if itemsize == 2 else 32, max(16, triton.next_power_of_2(R)))
    block_k = 32 if itemsize == 4 else 128 if block_r < 64 else 64
    programs = triton.cdiv(M, block_m) * triton.cdiv(R, block_r)
    steps = triton.cdiv(K, block_k)
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_K=block_k, BLOCK_SIZE_R=block_r,
        splits=max(1, min(PROGRAMS // max(1, programs), steps // 4, 16)),
        num_warps=4 if block_r < 64 else 8, num_stages=3,
    )  # fmt: skip


DOWN = LaunchConfig(
    op="lora_linear_down",
    default=down_config,
    keys=("M", "K", "rank", "itemsize"),
    entries=("BLOCK_SIZE_M", "num_warps", "num_stages"),
    candidates=combinations(BLOCK_SIZE_M=(16, 32, 64), num_warps=(4, 8), num_stages=(3, 4)),
)


def fwd_config(M: int, N: int, R: int, itemsize: int, precision: str, shared: int) -> dict:
    """Blocks, warps and stages; ``shared`` is the KiB of shared memory that a block can have."""
    if itemsize == 4 and precision == "ieee":
        blocks = (32, 64, 16, 8, 3) if M <= 32 else (64, 64, 32, 4, 3)
    elif itemsize == 4:
        blocks = (32 if M <= 32 else 64, 64, 32, 4, 3)
    elif M <= 64:
        blocks = (16 if M <= 16 else 32 if M <= 32 else 64, 64, 64, 4, 4)
    elif shared < 163:
        blocks = (128, 128, 32, 8, 4)
    elif shared < 227 or triton.cdiv(M, 128) * triton.cdiv(N, 256) < PROGRAMS // 2:
        blocks = (128, 128, 64, 8, 3)
    else:  # takes too many registers before sm_90, and leaves part of the GPU idle with few tiles
        blocks = (128, 256, 64, 8, 3)
    block_m, block_n, block_k, warps, stages = blocks
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_N=block_n, BLOCK_SIZE_K=block_k,
        BLOCK_SIZE_R=min(32, max(16, triton.next_power_of_2(R))),
        GROUP_SIZE_M=16, num_warps=warps, num_stages=stages,
    )  # fmt: skip


FWD = LaunchConfig(
    op="lora_linear_fwd",
    default=fwd_config,
    keys=("M", "N", "K", "rank", "itemsize", "transposed"),
    entries=(
        "BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"
    ),
    candidates=[
        {"BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in (
            (32, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 5), (128, 64, 4, 4), (128, 32, 4, 4),
            (128, 64, 8, 3), (128, 64, 8, 4), (256, 32, 8, 4), (256, 64, 8, 3),
        )
    ],
)  # fmt: skip


def wgrad_config(M: int, C: int, R: int, itemsize: int) -> dict:
    """Blocks, warps, stages and the number of parts that the tokens are split into."""
    block_m, block_c = (64, 128) if itemsize == 2 else (16, 64)
    block_r = min(64, max(16, triton.next_power_of_2(R)))
    programs = triton.cdiv(C, block_c) * triton.cdiv(R, block_r)
    return dict(
        BLOCK_SIZE_M=block_m, BLOCK_SIZE_C=block_c, BLOCK_SIZE_R=block_r,
        splits=max(1, min(PROGRAMS // programs, triton.cdiv(M, 4 * block_m), 32)),
        num_warps=8, num_stages=3,
    )  # fmt: skip


WGRAD = LaunchConfig(
    op="lora_linear_wgrad",
    default=wgrad_config,
    keys=("M", "K", "rank", "itemsize"),
    entries=("BLOCK_SIZE_C", "num_warps", "num_stages"),
    candidates=combinations(BLOCK_SIZE_C=(64, 128), num_warps=(4, 8), num_stages=(3, 4)),
)
