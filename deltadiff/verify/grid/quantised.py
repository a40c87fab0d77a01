"""Random calls of `lora_linear` over weights of few bits, and the bits of what these decode to."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...ops.decode_4bit import BLOCKSIZES, FourBit, decode_4bit
from ...ops.decode_fp8 import Float8, decode_fp8
from ...ops.quantised import Quantised
from .. import decode_4bit as four_bit
from .. import decode_fp8 as fp8
from ..quantised import decoder_of
from ..tolerance import Case, Row
from .compare import same_bits
from .draws import Draw
from .lora_linear import Call, draw_call, rows_of_call
from .memory import Layout, Memory
from .paths import backend_of

FP8_BLOCKS = ((128, 128), (1, 0), (0, 0), (7, 9), (64, 256))  # rows, columns; 0 for all


class Format(Protocol):
    """How the weights of a case are stored."""

    def weight(
        self, case: Case, memory: Memory, n: int, k: int, dtype: torch.dtype, odd: bool = False
    ) -> tuple[Quantised, Tensor]:
        """A random weight (N, K) in ``memory``, and the matrix in ``dtype`` that it stands for.

        ``odd``: whether some scales are not finite.
        """
        ...


@dataclass(frozen=True)
class FourBitFormat:
    """Weights of 4 bits.

    Attributes:
        nested: whether absmax is quantised in turn, in blocks of ``scale_blocksize``.
        offset: how far each part begins after a multiple of 16 bytes, in elements.
    """

    blocksize: int
    nested: bool
    scale_blocksize: int
    offset: int

    def __str__(self) -> str:
        of_scale = f"/{self.scale_blocksize}" if self.nested else ""
        return f"4 bits of {self.blocksize}{of_scale} offset={self.offset}"

    def weight(
        self, case: Case, memory: Memory, n: int, k: int, dtype: torch.dtype, odd: bool = False
    ) -> tuple[Quantised, Tensor]:
        drawn = four_bit.draw_4bit(case, n, k, self.blocksize, self.nested, self.scale_blocksize)
        if odd:
            _make_odd(case, drawn.absmax if drawn.scale is None else drawn.scale)
        beside = Layout(offset=self.offset)
        tensors = [None if t is None else memory.place(t, beside) for t in drawn.tensors]
        placed = FourBit(*tensors, drawn.shape, *drawn.blocksizes)
        return placed, four_bit.formula(placed, dtype)


@dataclass(frozen=True)
class Float8Format:
    """Weights in FP8; ``block`` is of rows and columns, 0 for all, ``offset`` as in 4 bits."""

    kind: torch.dtype
    block: tuple[int, int]
    offset: int

    def __str__(self) -> str:
        block = "x".join(map(str, self.block))
        return f"{str(self.kind).removeprefix('torch.')} of {block} offset={self.offset}"

    def weight(
        self, case: Case, memory: Memory, n: int, k: int, dtype: torch.dtype, odd: bool = False
    ) -> tuple[Quantised, Tensor]:
        block = self.block[0] or n, self.block[1] or k
        drawn = fp8.draw_fp8(case, n, k, block, self.kind)
        if odd:
            _make_odd(case, drawn.scale)
        beside = Layout(offset=self.offset)
        data = memory.place(drawn.data.view(torch.uint8), beside).view(self.kind)
        placed = Float8(data, memory.place(drawn.scale, beside), block)
        return placed, fp8.formula(placed, dtype)


def _make_odd(case: Case, scales: Tensor) -> None:
    flat = scales.view(-1)
    for value in (math.nan, math.inf, -math.inf):
        flat[case.random.randrange(flat.numel())] = value


def draw_four_bit(draw: Draw) -> Format:
    dice = draw.kind
    small = BLOCKSIZES[: BLOCKSIZES.index(256) + 1]  # which most matrices have several of
    return FourBitFormat(
        blocksize=dice.choice((*small, *BLOCKSIZES)),
        nested=dice.chance(0.6),
        scale_blocksize=dice.choice((256, *small, *BLOCKSIZES)),
        offset=dice.choice((0, 0, 1, 2, 3)),
    )


def draw_fp8(draw: Draw) -> Format:
    dice = draw.kind
    kind = dice.choice((torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2))
    return Float8Format(kind, dice.choice(FP8_BLOCKS), dice.choice((0, 0, 1, 2, 3)))


def decode_4bit_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case over 4 bits."""
    yield from _rows(case, draw, path, dtypes, draw_four_bit, decode_4bit)


def decode_fp8_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case over FP8, decoded."""
    yield from _rows(case, draw, path, dtypes, draw_fp8, decode_fp8)


def _rows(
    case: Case,
    draw: Draw,
    path: str,
    dtypes: tuple,
    draw_format: Callable[[Draw], Format],
    decode: Callable[..., Tensor],
) -> Iterator[Row]:
    call, stored = draw_call(draw, path, dtypes, case.device), draw_format(draw)
    case.shape += f" {call} {stored}"

    def weights(case: Case, memory: Memory, call: Call, odd: bool) -> tuple[Quantised, Tensor]:
        return stored.weight(case, memory, call.n, call.k, dtypes[0], odd)

    yield from rows_of_call(case, call, path, dtypes, weights)
    weight, expected = weights(case, Memory(math.nan), call, call.odd == "weight")
    found = decode(weight, dtypes[0], backend=decoder_of(backend_of(path)))
    both = [torch.where(t.isnan(), math.nan, t) for t in (found, expected)]  # NaN has many bits
    yield same_bits(case, "W", both[:1], both[1:])
