"""`split`: which training examples train the low-rank pairs in stage 1, and which the gates."""

from dataclasses import dataclass

import torch

from ..checks import check_int, check_number
from ..errors import ArgumentError


@dataclass(frozen=True)
class Split:
    """Which examples train A and B, and which validate, that is, train the gates.

    Attributes:
        train, valid: indices of examples.

    Raises:
        ArgumentError: one part is empty, or an example is in both.
    """

    train: tuple[int, ...]
    valid: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, part in (("train", self.train), ("valid", self.valid)):
            if not part:
                raise ArgumentError(name, "no examples", "at least one")
        both = sorted(set(self.train) & set(self.valid))
        if both:
            given = f"{len(both)} examples in both parts, the first is {both[0]}"
            raise ArgumentError("valid", given, "examples that are not in train")


def split(n: int, share: float = 1.0, valid_share: float = 0.5, seed: int = 0) -> Split:
    """Take a random part of ``n`` training examples and split it at random into two.

    Args:
        n: how many training examples there are.
        share: the share of them that the search takes, in (0, 1].
        valid_share: the share of the taken ones that validates, in (0, 1).
        seed: fixes the choice.

    Raises:
        ArgumentTypeError, ArgumentError: a share is out of its range or leaves a part empty.
    """
    check_int("n", n, 1)
    if not 0 < check_number("share", share) <= 1:
        raise ArgumentError("share", share, "a share in (0, 1]")
    if not 0 < check_number("valid_share", valid_share) < 1:
        raise ArgumentError("valid_share", valid_share, "a share in (0, 1)")
    taken = int(share * n + 1e-9)
    valid = round(valid_share * taken)
    if not 0 < valid < taken:
        given = f"{valid_share} of {taken} examples, which is {valid}"
        raise ArgumentError("valid_share", given, "at least one to train and one to validate")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return Split(tuple(order[valid:taken]), tuple(order[:valid]))
