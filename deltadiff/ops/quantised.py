"""The weights of few bits that `lora_linear` takes beside tensors of ordinary numbers."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .decode_4bit import FourBit, check_4bit, decoded_4bit
from .decode_fp8 import Float8, check_fp8, decoded_fp8

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Quantised = FourBit | Float8


def is_quantised(weight: object) -> "TypeIs[Quantised]":
    """Whether a weight is one of few bits."""
    return isinstance(weight, (FourBit, Float8))


def operation(weight: Quantised, passes: str) -> Any:
    """The operation over such a weight, see `lora_linear_quantised`: "", "_fwd" or "_bwd"."""
    name = "4bit" if isinstance(weight, FourBit) else "fp8"
    return getattr(torch.ops.deltadiff, f"lora_linear_{name}{passes}")


def check_quantised(name: str, weight: Quantised) -> None:
    """Raise where the parts of a weight of few bits do not fit each other."""
    if isinstance(weight, FourBit):
        check_4bit(name, weight)
    else:
        check_fp8(name, weight)


def first_rows(weight: Tensor | Quantised, count: int) -> Tensor | Quantised:
    """The first rows of W (N, K), at most ``count``, in its own memory and format."""
    return weight.first_rows(count) if is_quantised(weight) else weight[:count]


def decoded(weight: Tensor | Quantised, dtype: torch.dtype, backend: str) -> Tensor:
    """W (N, K) in ``dtype``, by the backend that runs the call; a tensor as it is."""
    if isinstance(weight, FourBit):
        return decoded_4bit(weight, dtype, backend)
    return decoded_fp8(weight, dtype, backend) if isinstance(weight, Float8) else weight
