"""Decoding of weights in FP8: W = data * scale, with one scale for each block of data.

The memory bounds this kernel: it reads one byte and writes 2 or 4 bytes for each element. From
sm_89 on, GPUs convert FP8 themselves. For the older ones its bits are unpacked, three times as many
instructions, which still take less time than the memory there.
"""

import torch
import triton
import triton.language as tl

from .runtime import gpu
from .runtime.cached_launch import launch_cached, specialisation

_ROWS, _COLUMNS = 8, 512  # of the tile of a program
_GROUP = 8  # elements that a thread takes at once: 16 bytes of bfloat16 or float16


@triton.jit
def fp8_value(byte, E5M2: tl.constexpr, CONVERTS: tl.constexpr):
    """The float32 number of the bits of a float8_e4m3fn, or of a float8_e5m2.

    CONVERTS: whether the GPU does that itself. Else float16 helps, which has the same order of
    bits, and as many for the exponent as e5m2. e4m3 read as the first bits of a float16's exponent
    and mantissa is smaller by 2^8, subnormal numbers too.
    """
    if CONVERTS:
        dtype: tl.constexpr = tl.float8e5 if E5M2 else tl.float8e4nv
        return byte.to(dtype, bitcast=True).to(tl.float32)
    bits = byte.to(tl.uint16)
    if E5M2:
        return (bits << 8).to(tl.float16, bitcast=True).to(tl.float32)
    half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _decode_fp8_kernel(
    data_ptr, scale_ptr, out_ptr, N, K, block_n, block_k, stride_scale,
    E5M2: tl.constexpr, CONVERTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of W. GROUP: of how many elements in a row, from a multiple of it on, one scale is."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    has_scale = (rows < N)[:, None] & (groups * GROUP < K)[None, :]
    place = (rows // block_n)[:, None] * stride_scale + (groups * GROUP // block_k)[None, :]
    scale = tl.load(scale_ptr + place, mask=has_scale, other=0.0)
    mask = (rows < N)[:, None, None] & (columns < K)[None, :, :]
    offs = rows.to(tl.int64)[:, None, None] * K + columns[None, :, :]
    byte = tl.load(data_ptr + offs, mask=mask, other=0)
    value = fp8_value(byte, E5M2, CONVERTS) * scale[:, :, None]
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


def decode_fp8(data, scale, block, out) -> None:
    """Writes a weight in FP8, a `deltadiff.ops.decode_fp8.Float8`, to ``out`` (N, K)."""
    (n, k), (block_n, block_k) = data.shape, block
    group = _GROUP if block_k % _GROUP == 0 or block_k >= k else 1
    how = data.dtype == torch.float8_e5m2, gpu.capability(out.device) >= (8, 9), group
    args = data.view(torch.uint8), scale, out, n, k, block_n, block_k, scale.stride(0)
    grid = triton.cdiv(n, _ROWS), triton.cdiv(k, _COLUMNS)
    with gpu.on_device(out.device):
        launch_cached(
            _decode_fp8_kernel, grid, (*specialisation(*args), *how), *args, *how, _ROWS, _COLUMNS,
            num_warps=4,
        )  # fmt: skip
