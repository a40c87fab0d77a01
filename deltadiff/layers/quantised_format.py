"""`QuantisedFormat`: what `lora_linear` must know of layers whose weight it decodes itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dispatch import Dispatch
from ..ops.quantised import Quantised
from .hooks import hooks_of

# (x, base layer, weight, A, B, scaling, gate, dropout, backend) -> y
Branch = Callable[
    [Tensor, Any, Quantised, Tensor, Tensor, float, Tensor | None, float, str | None], Tensor
]


@dataclass(frozen=True)
class QuantisedFormat:
    """How `lora_linear` computes what the layers of one format would.

    Attributes:
        weight_of: what it multiplies by, from a layer; in words, why that is not what it would do.
        compute_dtype: the dtype of a pass, from (layer, x); x is None for passes to come.
        changes_dtype: whether a pass is of another dtype than x, or than that of autocast.
        runs_fused: whether a backend of `lora_linear` runs (weight, dtype, rank, dropout, backend);
            else the layer's own product does, beside the low-rank branch.
        path: what runs a layer, and why, from (layer, rank, dropout, backend).
        branch: the pass.
    """

    weight_of: Callable[[Any], Quantised | str]
    compute_dtype: Callable[[Any, Tensor | None], torch.dtype]
    changes_dtype: Callable[[Any, Tensor], bool]
    runs_fused: Callable[[Any, torch.dtype, int, float, str | None], bool]
    path: Callable[[Any, int, float, str | None], Dispatch]
    branch: Branch


def why_called(base: nn.Module) -> str | None:
    """None where a call of a quantised layer does no more than its class says, else what."""
    if next(hooks_of(base), None) is not None:
        return "hooks on it"
    if "forward" in vars(base) and not _only_moves_inputs(base):
        return "a forward pass that was put on it"
    return None


def _only_moves_inputs(base: Any) -> bool:
    """Whether the forward pass on an instance is that of accelerate's hook for a ``device_map``.

    transformers puts one on each layer of a quantised model. It moves the input to the device of
    the layer; `lora_linear` refuses inputs on another one.
    """
    hook = vars(base).get("_hf_hook")
    moves = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    return moves and vars(base).get("_old_forward") == type(base).forward.__get__(base)
