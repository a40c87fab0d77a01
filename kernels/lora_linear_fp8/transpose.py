"""W^T of a weight of one byte an element."""

import torch
import triton
import triton.language as tl

from ..runtime.cached_launch import launch_cached, specialisation


@triton.jit(do_not_specialize=["N", "K"])
def transpose_kernel(
    w_ptr, out_ptr, N, K, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr
):  # fmt: skip
    """out (4 K, N) = W (4 N, K)^T as bytes, of which each int32 here holds four.

    A thread turns a square of 4 x 4 bytes around in registers. The rest moves whole int32.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_SIZE_N + tl.arange(0, BLOCK_SIZE_N)
    offs_k = tl.program_id(1).to(tl.int64) * BLOCK_SIZE_K + tl.arange(0, BLOCK_SIZE_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    w_ptrs = w_ptr + offs_n[:, None] * 4 * K + offs_k[None, :]
    a = tl.load(w_ptrs, mask=mask, other=0)  # row 4 n, columns 4 k to 4 k + 3
    b = tl.load(w_ptrs + K, mask=mask, other=0)
    c = tl.load(w_ptrs + 2 * K, mask=mask, other=0)
    d = tl.load(w_ptrs + 3 * K, mask=mask, other=0)
    out_ptrs = out_ptr + (4 * offs_k)[:, None] * N + offs_n[None, :]
    out_mask = tl.trans(mask)
    for i in tl.static_range(4):  # column 4 k + i of the four rows, the first one lowest
        column = (
            ((a >> 8 * i) & 255) | (((b >> 8 * i) & 255) << 8)
            | (((c >> 8 * i) & 255) << 16) | (((d >> 8 * i) & 255) << 24)
        )  # fmt: skip
        tl.store(out_ptrs + i * N, tl.trans(column), mask=out_mask)


def transposed(data):
    """W^T (K, N) of the bytes of W (N, K).

    Raises:
        torch.OutOfMemoryError: there is no room for it, as the message says.
    """
    n, k = data.shape
    try:
        out = data.new_empty((k, n))
    except torch.OutOfMemoryError as error:
        needed = f"the backward pass of products in FP8 needs {n * k:,} bytes for W^T"
        raise torch.OutOfMemoryError(f"{needed}. {error}") from error
    block = 32, 32
    grid = tuple(triton.cdiv(size // 4, side) for size, side in zip((n, k), block, strict=True))
    ints = data.view(torch.int32), out.view(torch.int32), n // 4, k // 4
    launch_cached(
        transpose_kernel, grid, specialisation(*ints[:2]), *ints, *block, num_warps=4
    )  # fmt: skip
    return out
