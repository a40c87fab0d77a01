"""The specification of `decode_4bit`, as `reference.py` is of the operations that train."""

import torch
from torch import Tensor


def decode_4bit_ref(
    packed: Tensor,
    absmax: Tensor,
    code: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """W (N, K) = code[number] * absmax, with one absmax for each ``blocksize`` of the numbers.

    ``packed`` holds two numbers of 4 bits in a byte, the first one in its upper half. The product
    of float32 numbers is rounded once to ``dtype``.
    """
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # for each byte
    one = pairs.view(torch.float64).view(-1)  # a pair, taken as one number, is looked up at once
    values = one.index_select(0, packed.int()).view(torch.float32)
    missing = absmax.numel() * blocksize - values.numel()
    values = torch.nn.functional.pad(values, (0, max(0, missing)))
    values = values[: absmax.numel() * blocksize].view(-1, blocksize) * absmax[:, None]
    return values.view(-1)[: shape[0] * shape[1]].view(shape).to(dtype)


def absmax_ref(
    absmax: Tensor, scale: Tensor, scale_code: Tensor, offset: Tensor, scale_blocksize: int
) -> Tensor:
    """absmax that was quantised in turn: scale_code[absmax] * scale + offset, in float32."""
    block = torch.arange(absmax.numel(), device=absmax.device) // scale_blocksize
    return scale_code[absmax.int()] * scale[block] + offset
