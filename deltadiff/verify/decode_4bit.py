"""The cases of `decode_4bit`, and of `lora_linear` over 4 bits, in `deltadiff verify`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.decode_4bit import FourBit, decode_4bit
from .quantised import quantised_rows
from .tolerance import Bench, Case, Row


def check_decode_4bit(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are tokens, in, out, r, numbers with one absmax."""
    shapes = bench.shapes(
        quick=[(40, 192, 80, 8, 64), (37, 129, 65, 3, 32)],
        full=[(64, 768, 640, 16, 128), (512, 1024, 64, 4, 4096), (16, 63, 40, 8, 64)],
        gpu=[(1, 4096, 4096, 16, 64), (64, 4096, 11008, 16, 64), (8192, 4096, 4096, 16, 64)],
        quick_gpu=[(640, 520, 776, 16, 64)],
    )
    for tokens, k, n, r, blocksize in shapes:
        for dtypes in bench.dtypes():
            shape = f"{tokens}x{k}x{n} r={r} of {blocksize}"
            case = bench.case("decode_4bit", dtypes, shape, (n, k, r), False, tokens)
            yield from case.guard(decode_4bit_rows, tokens, k, n, r, blocksize, *dtypes)


def decode_4bit_rows(case, tokens, k, n, r, blocksize, dtype, adapter) -> Iterator[Row]:
    """The rows of one case, with an absmax that is quantised in turn and with one that is not."""
    weights = (draw_4bit(case, n, k, blocksize, nested) for nested in (False, True))
    yield from quantised_rows(case, weights, decode_4bit, formula, tokens, r, dtype, adapter)


def draw_4bit(
    case: Case, n: int, k: int, blocksize: int, nested: bool, scale_blocksize: int = 256
) -> FourBit:
    """A weight of random numbers of about k^-0.5, with an absmax of one or of two levels.

    NF4 and FP4 are two tables of 16 numbers; here such a table is random, too.
    """
    real = torch.float32
    blocks = -(-n * k // blocksize)
    packed = case.integers(-(-n * k // 2), most=127, dtype=torch.int8).view(torch.uint8)
    code = case.uniform(16, low=-1.0, high=1.0, dtype=real)
    if not nested:
        absmax = case.uniform(blocks, low=1.0, high=3.0, dtype=real) * k**-0.5
        return FourBit(packed, absmax, code, None, None, None, (n, k), blocksize, 0)
    absmax = case.integers(blocks, most=127, dtype=torch.int8).view(torch.uint8)
    scale = case.uniform(-(-blocks // scale_blocksize), low=0.5, high=1.0, dtype=real) * k**-0.5
    scale_code = case.uniform(256, low=-1.0, high=1.0, dtype=real)
    offset = case.uniform(1, low=1.5, high=2.0, dtype=real).view(()) * k**-0.5
    nested_in = scale, scale_code, offset
    return FourBit(packed, absmax, code, *nested_in, (n, k), blocksize, scale_blocksize)


def formula(weight: FourBit, dtype: torch.dtype) -> Tensor:
    """W written down: one number, one absmax and one product for each element."""
    n, k = weight.shape
    element = torch.arange(n * k, device=weight.device)
    number = weight.packed[element // 2].int() >> 4 * (1 - element % 2) & 15
    block = element // weight.blocksize
    absmax = weight.absmax[block]
    if weight.scale is not None:
        entry = weight.scale_code[absmax.int()]
        absmax = entry * weight.scale[block // weight.scale_blocksize] + weight.offset
    return (weight.code[number] * absmax).view(n, k).to(dtype)
