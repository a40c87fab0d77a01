"""`fused_branch`: one call of `lora_linear` for a layer in a model."""

import torch
from torch import Tensor

from ..ops.lora_linear import lora_linear
from ..ops.quantised import Quantised


def fused_branch(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gate: Tensor | None,
    dropout: float,
    backend: str | None,
) -> Tensor:
    """One call of `lora_linear`; with dropout, PyTorch's generator gives the seed of the mask."""
    seed = torch.randint(2**63 - 1, (), device=x.device) if dropout else 0
    return lora_linear(
        x, weight, a, b, scaling=scaling, gate=gate, bias=bias,
        dropout=dropout, seed=seed, backend=backend,
    )  # fmt: skip
