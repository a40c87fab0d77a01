"""The cases of `decode_fp8`, and of `lora_linear` over FP8, in `deltadiff verify`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops.decode_fp8 import Float8, decode_fp8
from .quantised import quantised_rows
from .tolerance import Bench, Row


def check_decode_fp8(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are tokens, in, out, r; the sides of a block, 0 for all."""
    shapes = bench.shapes(
        quick=[(40, 192, 80, 8, 128, 128), (37, 129, 65, 3, 1, 0)],
        full=[(64, 768, 640, 16, 0, 0), (512, 1024, 64, 4, 128, 128), (16, 63, 40, 8, 7, 9)],
        gpu=[
            (1, 4096, 4096, 16, 128, 128), (64, 4096, 11008, 16, 1, 0),
            (8192, 4096, 4096, 16, 128, 128),
        ],
        quick_gpu=[(640, 520, 776, 16, 128, 128)],
    )  # fmt: skip
    for tokens, k, n, r, rows, columns in shapes:
        block = rows or n, columns or k
        for dtypes in bench.dtypes():
            shape = f"{tokens}x{k}x{n} r={r} of {block[0]}x{block[1]}"
            case = bench.case("decode_fp8", dtypes, shape, (n, k, r), False, tokens)
            yield from case.guard(decode_fp8_rows, tokens, k, n, r, block, *dtypes)


def decode_fp8_rows(case, tokens, k, n, r, block, dtype, adapter) -> Iterator[Row]:
    """The rows of one case, with data of float8_e4m3fn and of float8_e5m2."""
    kinds = torch.float8_e4m3fn, torch.float8_e5m2
    weights = (draw_fp8(case, n, k, block, kind) for kind in kinds)
    yield from quantised_rows(case, weights, decode_fp8, formula, tokens, r, dtype, adapter)


def draw_fp8(case, n: int, k: int, block: tuple[int, int], kind: torch.dtype) -> Float8:
    """A weight of any bytes but those of inf and NaN; its elements are about k^-0.5."""
    most = 0x7E if kind == torch.float8_e4m3fn else 0x7B
    number = case.integers(n, k, most=most, dtype=torch.int16)
    data = (number.abs() | (number < 0).to(torch.int16) << 7).to(torch.uint8).view(kind)
    blocks = -(-n // block[0]), -(-k // block[1])
    scale = case.uniform(*blocks, low=0.5, high=1.0, dtype=torch.float32)
    return Float8(data, scale * k**-0.5 / data.float().square().mean().sqrt(), block)


def formula(weight: Float8, dtype: torch.dtype) -> Tensor:
    """W written down: one number, one scale and one product for each element."""
    (n, k), (rows, columns) = weight.shape, weight.block
    row, column = (torch.arange(size, device=weight.device) for size in (n, k))
    scale = weight.scale[(row // rows)[:, None], (column // columns)[None, :]]
    return (weight.data.float() * scale).to(dtype)
