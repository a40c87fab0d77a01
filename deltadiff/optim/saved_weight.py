"""W and the remainder of a 16-bit W in the state of `DeltaLoRA`.

The remainder is written as bytes, and read in all formats:

format 3     uint8 of twice the width, laid out as the weight is: no backend of torch.distributed
             can gather int16, and other code casts it as if it were a moment of AdamW
before       int16, (out_features, in_features)
at first     float16 beside a float16 weight: the rounding error of W, so that their float32 sum is
             the weight that the state stands for
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import REMAINDER_DTYPES
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..ops.reference import split_remainder
from ..ranks import view_dtype


def remainder_to_bytes(low: Tensor, layer: LoraLayer) -> Tensor:
    """The remainder of a layer as a state has it."""
    return view_dtype(low.T if layer.transposed else low, torch.uint8)


def read_remainder(entry: dict[str, Any], weight: Tensor, layer: LoraLayer) -> Tensor:
    """W of a state, after an int16 remainder took the place of what ``entry`` had.

    ``weight``: as the state has it. What does not fit is left to the checks that follow.
    """
    found, dtype = entry.get("remainder"), REMAINDER_DTYPES.get(weight.dtype)
    if dtype is None or not isinstance(found, Tensor) or found.dim() != 2 or found.is_meta:
        return weight
    if found.dtype == torch.uint8 and found.shape[1] % dtype.itemsize == 0:
        low = view_dtype(found.detach(), dtype)
        entry["remainder"] = low.T if layer.transposed else low
    matrix = weight.T if layer.transposed else weight
    if (found.dtype, weight.dtype) != (torch.float16, torch.float16) or matrix.shape != found.shape:
        return weight
    high, entry["remainder"] = split_remainder(matrix.float() + found.float(), torch.float16)
    return high.T if layer.transposed else high


def take_weight(name: str, entry: dict[str, Any], layer: LoraLayer) -> Tensor:
    """W, removed from ``entry``; raises where it is missing or does not fit the layer's."""
    saved, w = entry.pop("weight", None), layer.weight
    if not isinstance(saved, Tensor):
        form = "none" if saved is None else type(saved).__name__
    elif (saved.shape, saved.dtype, saved.is_meta) == (w.shape, w.dtype, w.is_meta):
        return saved
    else:
        form = f"{tuple(saved.shape)} of {saved.dtype}"
    accepted = f"{tuple(w.shape)} of {w.dtype}, as in this model"
    raise ArgumentError(f"weight of {name} in state_dict", form, accepted)
