"""`LowRankFactors`: a part of an update of W as the product of two factors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LowRankFactors:
    """A part of W_T - W_0 as the product B A of two factors.

    Attributes:
        B, A: (out_features, rank) and (rank, in_features).
        in_weight: True where W holds the product, False where the forward pass adds it.
    """

    B: Tensor
    A: Tensor
    in_weight: bool
