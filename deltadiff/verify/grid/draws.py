"""The random choices of a case: sizes, layouts, and what a case costs at most.

A case is a function of a seed, its operation, path, dtype and number. On a GPU every new form of a
call compiles kernels for seconds, so a few *kinds* of calls come again and again there, with other
sizes and numbers each time; on a CPU each case is of a kind of its own.
"""

import random
from typing import NamedTuple

import torch

from .memory import Layout

RANKS = (
    *(1, 2, 3, 4, 5, 7, 8, 8, 11, 13, 16, 16, 17, 24, 31, 32, 33, 47, 48, 61, 64, 64, 65, 96),
    *(127, 128, 128, 131, 192, 200, 251, 255, 256),
)  # fmt: skip
TOKENS = ((0, 0), (1, 1), (2, 16), (17, 64), (65, 255), (256, 511), (512, 1024), (1025, 4099))
LARGEST, LARGEST_BATCH = 14336, 4099  # features and tokens


class Costs(NamedTuple):
    """What a case may cost."""

    products: float  # multiplications, the logarithm to base 2 of their smallest and largest
    most_products: float
    elements: int  # of one matrix
    rank: int
    tokens: int
    repeats: int  # with other numbers, where an output is so small that its error is luck
    kinds: int | None  # how many kinds of calls there are; None is one for each case


ON_CPU = Costs(8, 25, 2**22, 256, LARGEST_BATCH, 32, None)
INTERPRETED = Costs(4, 11, 2**9, 33, 40, 8, None)
ON_GPU = Costs(12, 34, 2**26, 256, LARGEST_BATCH, 32, 10)


def costs_of(device: torch.device, interpreted: bool) -> Costs:
    """What a case on this device may cost; ``interpreted`` is by Triton's interpreter."""
    return ON_GPU if device.type == "cuda" else INTERPRETED if interpreted else ON_CPU


class Dice(random.Random):
    """Random numbers that a text determines."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, least: int, most: int) -> int:
        """An integer, small ones as often as large ones: its logarithm is uniform."""
        least, most = max(1, least), max(1, least, most)
        return min(most, int(least * ((most + 1) / least) ** self.random()))

    def layout(self, aligned: bool) -> Layout:
        """How a matrix lies in memory; ``aligned``: rows without gaps, at multiples of 16 bytes."""
        if aligned:
            return Layout(gap=16 if self.chance(0.2) else 0)
        offset = self.choice((0, 1, 2, 3))
        form = self.choice(("dense", "gap", "step", "transposed"))
        if form == "gap":
            return Layout(offset, gap=self.choice((1, 3, 8)))
        if form == "step":
            return Layout(offset, step=2)
        return Layout(offset, transposed=form == "transposed")

    def matrix(self, costs: Costs, rows: int, divisor: int) -> tuple[int, int]:
        """Two sizes, multiples of ``divisor``, of a matrix that ``rows`` rows are multiplied by."""
        products = 2 ** self.uniform(costs.products, costs.most_products)
        most = min(costs.elements, int(products / max(1, rows)))
        one = self.between(1, min(LARGEST, most))
        other = self.between(1, min(LARGEST, most // one))
        if self.chance(0.5):
            one, other = other, one
        return tuple(max(divisor, size // divisor * divisor) for size in (one, other))


class Draw:
    """The dice of one case.

    Attributes:
        kind: for what a kernel may be compiled for: dtypes, layouts, ranks, options.
        size: for all else.
    """

    def __init__(self, names: str, number: int, costs: Costs):
        self.costs = costs
        self.kind = Dice(f"{names} kind {number % (costs.kinds or number + 1)}")
        self.size = Dice(f"{names} {number}")
