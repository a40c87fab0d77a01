"""bitsandbytes' 4-bit layers as base layers: when `lora_linear` computes what they would, and how.

Such a layer computes in a dtype of its own, ``compute_dtype``, whatever the dtype of its input is,
and gives out that of its input. So does the fused pass: it decodes W in that dtype. Where the layer
does anything else than its class says, or `choose_4bit_path` says so, the layer itself is called,
and the low-rank branch is added to its output (see `base_format`).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..kernels.runtime.dtypes import DTYPES as KERNEL_DTYPES
from ..ops.decode_4bit import FourBit
from ..ops.dispatch import Dispatch, choose_4bit_path
from .hooks import HOOKS
from .linear import linear_shape

_LAYERS = ("Linear4bit", "LinearNF4", "LinearFP4")


def is_four_bit(weight: Tensor) -> bool:
    """Whether this is the weight of a 4-bit layer of bitsandbytes."""
    kind = type(weight)
    return kind.__name__ == "Params4bit" and kind.__module__.startswith("bitsandbytes.")


def is_four_bit_layer(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes, and none of a class made of those."""
    kind = type(module)
    return kind.__name__ in _LAYERS and kind.__module__.startswith("bitsandbytes.")


def compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    """The dtype in which a 4-bit layer computes: its own, or where it has none, that of x."""
    return base.compute_dtype or x.dtype


def casts(base: Any, x: Tensor) -> bool:
    """Whether a 4-bit layer computes in another dtype than that of x, or than autocast's."""
    dtype, device = compute_dtype(base, x), x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
    return x.dtype != dtype or autocast


def four_bit_path(base: Any, r: int, dropout: float, backend: str | None) -> Dispatch:
    """What runs a 4-bit layer with a branch of rank r: a backend of `lora_linear`, or the layer.

    The latter is called backend "reference". A layer without a dtype of its own is supposed to get
    inputs of the dtype that its weight was quantised from.

    Raises:
        BackendUnavailableError: ``backend`` cannot run it here.
    """
    weight = as_four_bit(base)
    if isinstance(weight, str):
        return _own_product(weight)
    dtype = base.compute_dtype or base.weight.quant_state.dtype
    path = choose_4bit_path(*_call(weight, dtype, r, dropout, backend))
    if path.backend == "reference":
        return _own_product(path.reason)
    return replace(path, reason=f"{path.reason}; 4-bit weight: decoded in each pass")


def _own_product(reason: str) -> Dispatch:
    return Dispatch("reference", f"4-bit weight: the base layer's own product ({reason})")


def runs_fused(
    weight: FourBit, dtype: torch.dtype, r: int, dropout: float, backend: str | None
) -> bool:
    """Whether `lora_linear` is to run a layer with this weight, which computes in ``dtype``."""
    return _runs_fused(*_call(weight, dtype, r, dropout, backend))


@torch.compiler.assume_constant_result
def _runs_fused(*call: Any) -> bool:
    return choose_4bit_path(*call).backend != "reference"


def _call(
    weight: FourBit, dtype: torch.dtype, r: int, dropout: float, backend: str | None
) -> tuple[Any, ...]:
    layer = (*weight.shape, r)
    return weight.device, dtype, backend, layer, dropout > 0, weight.blocksize


def as_four_bit(base: Any) -> FourBit | str:
    """The weight, where `lora_linear` computes what this layer would, else in words why not."""
    if not is_four_bit_layer(base):
        return f"{type(base).__name__} has a forward pass of its own"
    for hooks in HOOKS:
        if getattr(base, hooks):
            return "hooks on it"
    if "forward" in vars(base) and not _only_moves_inputs(base):
        return "a forward pass that was put on it"
    if base.compute_dtype not in (None, *KERNEL_DTYPES):
        return f"it computes in {base.compute_dtype}"
    try:
        weight = FourBit.of(base.weight)
    except ArgumentError as error:
        return error.given
    if weight.shape != linear_shape(base):
        return f"it was quantised as {weight.shape[0]} x {weight.shape[1]}"
    return weight


def _only_moves_inputs(base: Any) -> bool:
    """Whether the forward pass on an instance is that of accelerate's hook for a ``device_map``.

    transformers puts one on each layer of a quantised model. It moves the input to the device of
    the layer; `lora_linear` refuses inputs on another one.
    """
    hook = vars(base).get("_hf_hook")
    moves = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    return moves and vars(base).get("_old_forward") == type(base).forward.__get__(base)
