"""Layers with a weight in FP8 as base layers: transformers' FP8Linear, torchao's, and our own.

`lora_linear` decodes W in each pass and takes the activations as they are, unless it is asked for
backend "fp8". The own product of such a layer may quantise its activations to FP8, too; scales for
them are then a part of the layer, which are not used here. The result is nearer to that of the
layer before it was quantised. Older versions of FP8Linear alone give no gradient of their input.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import DTYPES, dtype_name
from ..errors import ArgumentError, SwapError
from ..ops.decode_fp8 import DATA_DTYPES, Float8, check_fp8, is_fp8
from ..ops.dispatch import Dispatch, choose_fp8_path
from ..ops.lora_linear import autocast_dtype
from ..ranks import is_sharded, local
from .fused_branch import fused_branch
from .linear import linear_shape
from .quantised_format import QuantisedFormat, why_called

# What such a layer holds beside weight and bias.
SCALES = ("weight_scale_inv", "activation_scale")
# Beside FP8Linear, what its product has for the backward pass in newer versions of transformers.
_BACKWARD = "FP8LinearFunction"


def is_fp8_layer(module: nn.Module) -> bool:
    """Whether a module is of a class that holds a weight in FP8 and its scales as parameters."""
    kind = type(module)
    of_transformers = kind.__name__ == "FP8Linear" and kind.__module__.startswith("transformers.")
    ours = kind.__name__ == "Float8Linear" and kind.__module__.startswith("deltadiff.")
    return of_transformers or ours


def stores_fp8(base: nn.Module) -> bool:
    """Whether a layer keeps its weight in FP8, or did so until something cast it."""
    weight: Any = base.weight
    return is_fp8(weight) or is_fp8_layer(base) and weight.dtype in DTYPES


def scales_of(base: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a layer that belong to a weight in FP8, by name; empty for other layers."""
    held = base._parameters if is_fp8_layer(base) else {}
    return {name: held[name] for name in SCALES if name in held}


def why_not_fp8(module: nn.Module) -> str | None:
    """None for a layer with a weight in FP8 that can be decoded, else the reason in words."""
    found = _read(module)
    return found if isinstance(found, str) else None


def _read(module: Any) -> Float8 | str:
    """The weight of a layer, or in words why it cannot be decoded."""
    dtype = dtype_name(module.weight.dtype)
    if type(module) is not nn.Linear and not is_fp8_layer(module):
        return f"its weight is {dtype}, a format that cannot be taken"
    if not is_fp8(module.weight):
        return f"its weight is {dtype} beside scales of FP8, which it was cast from"
    try:
        weight = Float8.of(module)
        check_fp8("weight", weight)
    except ArgumentError as error:
        return f"its weight in FP8 cannot be taken ({error})"
    if weight.shape != linear_shape(module):
        return f"its weight has the shape {tuple(weight.shape)}: packed"
    return weight


def _weight_of(base: Any) -> Float8 | str:
    """The weight, where `lora_linear` computes what this layer would, else in words why not.

    While a weight is split over processes, it is this one's part, which tells as much to whoever
    asks for the path of passes to come.

    Raises:
        SwapError: FSDP's mixed precision or something else has cast FP8, as if it held the numbers.
    """
    stored: Any = base.weight
    if not is_fp8(stored):
        given = f"{stored.dtype} beside scales of FP8, which it was cast from"
        accepted = "FP8 as it was: no cast, and no FSDP with a param_dtype, which casts it, too"
        raise SwapError("weight", given, accepted)
    if is_sharded(stored):
        weight = Float8.of(base)
        return weight._replace(data=local(weight.data), scale=local(weight.scale))
    return why_called(base) or _read(base)


def _compute_dtype(base: Any, x: Tensor | None) -> torch.dtype:
    """That of x or of autocast; for passes to come, that which the layer was quantised from."""
    if x is not None:
        return autocast_dtype(x) or x.dtype
    before, bias = getattr(base, "dtype_before", None), base.bias
    known: tuple[Any, ...] = before, base.weight.dtype, getattr(bias, "dtype", None)
    return next((dtype for dtype in known if dtype in DTYPES), torch.bfloat16)


def _changes_dtype(base: Any, x: Tensor) -> bool:
    """Only a bias may; autocast is `lora_linear`'s own business."""
    return autocast_dtype(x) is None and base.bias is not None and base.bias.dtype != x.dtype


def _path(base: Any, r: int, dropout: float, backend: str | None) -> Dispatch:
    layer, device = (*linear_shape(base), r), base.weight.device
    weight, dtype = _weight_of(base), _compute_dtype(base, None)
    block = weight.e4m3_block if isinstance(weight, Float8) else None
    return choose_fp8_path(device, dtype, backend, layer, dropout > 0, block)


def _branch(x: Tensor, base: Any, weight: Any, *product: Any) -> Tensor:
    bias = base.bias.to(x.dtype) if _changes_dtype(base, x) else base.bias
    return fused_branch(x, weight, bias, *product)


def describe_products(bases: Iterable[Any]) -> list[str]:
    """A line for each kind of layer whose weight is decoded, and whose own product is another."""
    found: dict[str, int] = {}
    for base in bases:
        if is_fp8(base.weight) and _quantises_activations(base):
            words = f"{type(base).__name__} itself would quantise the activations, too"
            if getattr(base, "activation_scale", None) is not None:
                words += " (its activation_scale is not used)"
            if is_fp8_layer(base) and not hasattr(sys.modules[type(base).__module__], _BACKWARD):
                words += ", and give no gradient of them"
            found[words] = found.get(words, 0) + 1
    return [f"weights in FP8 that are decoded: {n}; {words}" for words, n in found.items()]


def _quantises_activations(base: Any) -> bool:
    """Whether the own product of a layer does, by its class or by torchao's configuration."""
    if is_fp8_layer(base):
        return type(base).__module__.startswith("transformers.")
    return getattr(base.weight, "act_quant_kwargs", None) is not None


def keeping_fp8(module: Any, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` of ``module._apply``, which lets FP8 and its scales keep their dtypes.

    ``model.to(torch.bfloat16)`` would take W without its scales, and round these.
    """
    if module.weight.dtype not in DATA_DTYPES:
        return fn
    kept = [t for t in (module.weight, *map(module._parameters.get, SCALES)) if t is not None]

    def apply(t: Tensor) -> Tensor:
        if not any(t is one for one in kept):
            return fn(t)
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]
        moved = fn(t.view(integers))
        return moved.view(t.dtype) if moved.dtype == integers else t  # `type` casts these, too

    return apply


def why_not_loadable(module: Any, state: dict[str, Any], prefix: str) -> list[str]:
    """What speaks against the entries of a state for a layer that holds FP8, in words.

    torch would cast a weight of another dtype, and leave the scales as they were.
    """
    saved = state.get(f"{prefix}weight")
    if not isinstance(saved, Tensor) or module.weight.dtype not in DATA_DTYPES:
        return []
    scale = f"{prefix}weight_scale_inv"
    if saved.dtype == module.weight.dtype and scale in state:
        return []
    given = f"{dtype_name(saved.dtype)}{'' if scale in state else ' without ' + scale}"
    own = dtype_name(module.weight.dtype)
    return [f"{prefix}weight is {given}; this layer loads {own} together with its scales"]


FP8 = QuantisedFormat(
    weight_of=_weight_of,
    compute_dtype=_compute_dtype,
    changes_dtype=_changes_dtype,
    runs_fused=lambda *call: True,
    path=_path,
    branch=_branch,
)
