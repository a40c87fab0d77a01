"""Decoding of 4-bit weights as bitsandbytes stores them: W = code[number] * absmax.

The memory bounds this kernel: it reads half a byte and writes 2 or 4 bytes for each element. So a
thread loads four words at once, and stores 16 bytes at once. The 16 entries of the code are half a
cache line, which stays in the first cache, where no two lookups collide.
"""

import triton
import triton.language as tl

from .runtime.cached_launch import launch_cached
from .runtime.gpu import on_device


@triton.jit
def absmax_of(
    block, mask, absmax_ptr, scale_ptr, scale_code_ptr, offset_ptr, SCALE_BLOCKSIZE: tl.constexpr
):  # fmt: skip
    """The absmax of blocks, in float32; where it is quantised in turn, that is undone.

    To give bitsandbytes' bits, the product is rounded before the offset is added, so it must be
    compiled without ``enable_fp_fusion``.
    """
    absmax = tl.load(absmax_ptr + block, mask=mask)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + block // SCALE_BLOCKSIZE, mask=mask)
        entry = tl.load(scale_code_ptr + absmax.to(tl.int32), mask=mask)
        absmax = entry * scale + tl.load(offset_ptr)
    return absmax


@triton.jit(do_not_specialize=["numel"])
def _decode_4bit_kernel(
    packed_ptr, absmax_ptr, code_ptr, scale_ptr, scale_code_ptr, offset_ptr, out_ptr, numel,
    BLOCKSIZE: tl.constexpr, SCALE_BLOCKSIZE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Writes ``numel`` elements; each program decodes BLOCK_SIZE words of 8 numbers.

    EVEN: whether all programs have that many, which can be read as aligned words.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    offs, inside = tl.arange(0, BLOCK_SIZE), tl.arange(0, 8)
    elements = offs[:, None] * 8 + inside[None, :]
    shift = 4 * (inside ^ 1)[None, :]  # the upper half of a byte comes first
    if EVEN:
        mask_words, mask = None, None
        word = tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + start + offs)
        number = word[:, None] >> shift
    else:
        mask_words, mask = offs < tl.cdiv(numel, 8) - start, elements < numel - start * 8
        byte = tl.load(packed_ptr + start * 4 + elements // 2, mask=mask, other=0)
        number = byte.to(tl.int32) >> (shift & 4)
    absmax = absmax_of(
        (start + offs) // (BLOCKSIZE // 8), mask_words, absmax_ptr, scale_ptr, scale_code_ptr,
        offset_ptr, SCALE_BLOCKSIZE,
    )  # fmt: skip
    value = tl.load(code_ptr + (number & 15)) * absmax[:, None]
    tl.store(out_ptr + start * 8 + elements, value.to(out_ptr.dtype.element_ty), mask=mask)


def decode_4bit(weight, out) -> None:
    """Writes a weight of 4 bits, a `deltadiff.ops.decode_4bit.FourBit`, to ``out`` (N, K)."""
    numel, block = out.numel(), 512
    tensors = *weight.tensors, out
    aligned = [t is None or t.data_ptr() % 16 == 0 for t in tensors]
    even = aligned[0] and numel % (8 * block) == 0
    wide = numel >= 2**31  # then Triton passes it in 64 bits
    key = (out.dtype, weight.scale is None, *weight.blocksizes, even, wide, *aligned)
    with on_device(out.device):
        launch_cached(
            _decode_4bit_kernel, (triton.cdiv(numel, 8 * block),), key,
            *tensors, numel, *weight.blocksizes, even, block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
