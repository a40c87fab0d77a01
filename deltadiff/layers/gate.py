"""The gate of a layer: what stands between the factors of its pair, W + s B g A.

    one entry    a number: DiffoRA's gamma
    r entries    a diagonal matrix: AdaLoRA's Lambda, DyLoRA's mask
    r x r        a full matrix: FLoRA's core G

`lora_linear` takes the first two. A core goes into one of the factors before.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..ops.lora_linear import autocast_dtype

GATES = "one entry, one for each rank, or rank x rank"  # what `fits_rank` accepts, in words


def fits_rank(shape: Sequence[int], r: int) -> bool:
    """Whether a gate of this shape can stand between factors of rank r."""
    return tuple(shape) in ((), (1,), (r,), (r, r))


def is_core(gate: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a gate is a full matrix; one of a single entry is a number."""
    return gate is not None and gate.dim() == 2 and gate.numel() > 1


def fold_core(a: Tensor, b: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """(A', B') of rank r with B' A' = B G A; the smaller of the factors takes G in.

    Args:
        a, b: A (r, in_features) and B (out_features, r), in one dtype.
        core: G, (r, r).

    Autograd makes the gradient of G, r x r, from that of A' or B', which `lora_linear` gives. The
    product keeps the dtype of the factors, since `lora_linear` casts them itself under autocast.
    """
    off: Any = contextlib.nullcontext()
    if autocast_dtype(a) is not None:
        off = torch.autocast(a.device.type, enabled=False)
    with off:
        core = core.to(a.dtype)
        return (a, b @ core) if b.shape[0] < a.shape[1] else (core @ a, b)


def times_gate(b: Tensor, gate: Tensor) -> Tensor:
    """B g, (out_features, r), for a gate of any shape."""
    return b @ gate if is_core(gate) else b * gate
