"""Optimizer states from versions that kept a float16 remainder beside a float16 weight."""

from typing import Any

import torch
from torch import Tensor

from ..layers.lora_layers import LoraLayer
from ..ops.reference import split_remainder


def renew_remainder(entry: dict[str, Any], weight: Tensor, layer: LoraLayer) -> Tensor:
    """W of a state, after an int16 remainder took the place of a float16 one in ``entry``.

    The remainder was the rounding error of W, so their float32 sum is the weight that the state
    stands for. It is split anew. What does not fit is left to the checks that follow.
    """
    low = entry.get("remainder")
    if not isinstance(low, Tensor) or (low.dtype, weight.dtype) != (torch.float16, torch.float16):
        return weight
    matrix = weight.T if layer.transposed else weight
    if matrix.shape != low.shape:
        return weight
    high, entry["remainder"] = split_remainder(matrix.float() + low.float(), torch.float16)
    return high.T if layer.transposed else high
