"""The specification of `decode_fp8` and of the quantisation to FP8, as `reference.py` is of others.

Scales belong to blocks of (rows, columns). Blocks at the right and lower edges may be cut off.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


def decode_fp8_ref(
    data: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """W (N, K) = data * scale, with one scale for each block of ``data``.

    The product of float32 numbers is rounded once to ``dtype``.
    """
    return (data.to(torch.float32) * _for_each(scale, block, data.shape)).to(dtype)


def quantise_fp8_ref(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(data, scale) of a matrix of any float dtype: data is float8_e4m3fn, scale float32.

        scale = max |w| of the block / 448        1 where this is 0
        data  = w / scale, limited to +-448 and rounded to nearest, ties to even

    All arithmetic is that of float32. 448 is the largest number of float8_e4m3fn.
    """
    most = torch.finfo(E4M3).max
    (n, k), w = w.shape, w.to(torch.float32)
    rows, columns = (-(-size // side) for size, side in zip((n, k), block, strict=True))
    missing = 0, columns * block[1] - k, 0, rows * block[0] - n
    whole = torch.nn.functional.pad(w.abs(), missing)
    scale = whole.view(rows, block[0], columns, block[1]).amax((1, 3)) / most
    scale = torch.where(scale == 0, 1.0, scale)
    return (w / _for_each(scale, block, (n, k))).clamp(-most, most).to(E4M3), scale


def _for_each(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The scale of each element of a matrix of this shape."""
    for dim, (side, size) in enumerate(zip(block, shape, strict=True)):
        place = torch.arange(size, device=scale.device) // side
        scale = scale.index_select(dim, place)
    return scale
