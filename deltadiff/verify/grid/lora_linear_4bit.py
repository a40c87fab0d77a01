"""Random calls of `lora_linear` over weights of 4 bits, and the bits of what these decode to."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.decode_4bit import BLOCKSIZES, FourBit, decode_4bit
from ..decode_4bit import draw_4bit, formula
from ..quantised import decoder_of
from ..tolerance import Case, Row
from .compare import same_bits
from .draws import Draw
from .lora_linear import Call, draw_call, rows_of_call
from .memory import Layout, Memory
from .paths import backend_of


@dataclass(frozen=True)
class Format:
    """How a weight is stored.

    Attributes:
        nested: whether its absmax is quantised in turn, in blocks of ``scale_blocksize``.
        offset: how far each of its parts begins after a multiple of 16 bytes, in elements.
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
    ) -> tuple[FourBit, Tensor]:
        """A random weight (N, K) in ``memory``, and the matrix in ``dtype`` that it stands for."""
        drawn = draw_4bit(case, n, k, self.blocksize, self.nested, self.scale_blocksize)
        scales = drawn.absmax if drawn.scale is None else drawn.scale
        if odd:
            for value in (math.nan, math.inf, -math.inf):
                scales[case.random.randrange(scales.numel())] = value
        beside = Layout(offset=self.offset)
        tensors = [None if t is None else memory.place(t, beside) for t in drawn.tensors]
        placed = FourBit(*tensors, drawn.shape, *drawn.blocksizes)
        return placed, formula(placed, dtype)


def draw_format(draw: Draw) -> Format:
    dice = draw.kind
    small = BLOCKSIZES[: BLOCKSIZES.index(256) + 1]  # which most matrices have several of
    return Format(
        blocksize=dice.choice((*small, *BLOCKSIZES)),
        nested=dice.chance(0.6),
        scale_blocksize=dice.choice((256, *small, *BLOCKSIZES)),
        offset=dice.choice((0, 0, 1, 2, 3)),
    )


def lora_linear_4bit_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    call, stored = draw_call(draw, path, dtypes, case.device), draw_format(draw)
    case.shape += f" {call} {stored}"

    def weights(case: Case, memory: Memory, call: Call, odd: bool) -> tuple[FourBit, Tensor]:
        return stored.weight(case, memory, call.n, call.k, dtypes[0], odd)

    yield from rows_of_call(case, call, path, dtypes, weights)
    weight, expected = weights(case, Memory(math.nan), call, call.odd == "weight")
    found = decode_4bit(weight, dtypes[0], backend=decoder_of(backend_of(path)))
    both = [torch.where(t.isnan(), math.nan, t) for t in (found, expected)]  # NaN has many bits
    yield same_bits(case, "W", both[:1], both[1:])
