"""`why_peft`: which calls of PEFT's layers `lora_linear` cannot compute, and why."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...checks import DTYPES, HALF_DTYPES
from ...kernels.runtime.dtypes import DTYPES as KERNEL_DTYPES
from ...ops.transforms import TRANSFORMED, transformed
from ...ranks import is_sharded, is_unit, plain_kind
from ..base_format import quantised_format
from ..hooks import has_hooks
from ..linear import is_conv1d
from ..quantised_format import QuantisedFormat
from ..targets.eligible import has_same_product, is_tensor_parallel
from .units import (
    becomes_whole,
    dtype_given_out,
    dtype_in_passes,
    is_own_hook,
)

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


def active_adapters(layer: "LoraLayer") -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def dropout_of(layer: "LoraLayer", adapter: str) -> float:
    """The probability of an adapter's dropout now: 0 in evaluation."""
    drop = layer.lora_dropout[adapter]
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def kind_of(module: object) -> str:
    """The class of a module in words; PEFT has many a ``Linear``."""
    kind = type(module)
    tuner = kind.__module__.removeprefix("peft.tuners.")
    return kind.__name__ if tuner == kind.__module__ else f"PEFT's {tuner}.{kind.__name__}"


def why_peft(layer: "LoraLayer", x: Tensor | None = None) -> str | None:
    """None where `lora_linear` computes what PEFT's forward pass would, else the reason in words.

    ``x``: the input of the call. None asks about the calls to come, of the dtype of W.
    """
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged"
    base = layer.base_layer
    form = quantised_format(base)
    plain = plain_kind(base) is nn.Linear or is_conv1d(base) or has_same_product(base)
    if not plain and form is None:
        return f"its base layer is {kind_of(base)}"
    if is_tensor_parallel(base):
        return "tensor parallelism splits its base weight"
    names = active_adapters(layer)
    if not names:
        return "it has no active adapter"
    modules = [base] if form is None else []
    for name in names:
        reason = _why_not_adapter(layer, name)
        if reason is not None:
            return reason
        modules += layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if len(names) > 1 and any(dropout_of(layer, name) for name in names):
        return "dropout under several active adapters, each with a mask of its own"
    if any(has_hooks(module, is_own_hook) for module in modules):
        return "hooks on the modules inside of it"
    reason = why_not_now()
    if reason is None and form is not None:
        return _why_not_quantised(layer, base, form, names, x)
    return reason or _why_not_tensors(layer, base, names, x)


def why_not_now() -> str | None:
    """What keeps all layers from `lora_linear` at this moment, in words."""
    if _has_any_global_hook():
        return "hooks on all modules"
    if torch.compiler.is_compiling():  # it follows the transforms itself
        return None
    return TRANSFORMED if transformed() else None


# MiCA chooses the first values of A and B and freezes B; its forward pass is that of LoRA.
_PLAIN_VARIANTS = ("MiCALinearVariant",)


def _why_not_adapter(layer: "LoraLayer", name: str) -> str | None:
    variant = type(layer.lora_variant.get(name)).__name__
    if name in layer.lora_variant and variant not in _PLAIN_VARIANTS:
        return f"a variant of LoRA: {variant}"
    if layer.lora_bias[name]:
        return "lora_bias"
    kinds = plain_kind(layer.lora_A[name]), plain_kind(layer.lora_B[name])
    if kinds != (nn.Linear, nn.Linear):
        return f"lora_A and lora_B are {kinds[0].__name__} and {kinds[1].__name__}"
    drop = layer.lora_dropout[name]
    if type(drop) is not nn.Identity and (type(drop) is not nn.Dropout or drop.p == 1):
        return f"its dropout is {drop}"
    return None


def _why_not_tensors(
    layer: "LoraLayer", base: nn.Module, names: list[str], x: Tensor | None
) -> str | None:
    weight: Any = base.weight
    if weight.requires_grad:
        return "its base weight is trained"
    if weight.dtype not in DTYPES:
        return f"its base weight is {weight.dtype}"
    pairs = [m[name] for name in names for m in (layer.lora_A, layer.lora_B)]
    for module in (base, *pairs):
        # FSDP makes the weights of a unit whole when it is called: of this layer, when it runs.
        later = (x is None or is_unit(module)) and becomes_whole(module)
        if (
            type(module.weight) is not nn.Parameter
            and type(module.weight) is not Tensor
            and not later
        ):
            return "its parameters are no whole tensors"
        if is_unit(module) and torch.compiler.is_compiling():
            return "modules inside of it are units of FSDP, in a compiled model"
    if any(m.weight.device != weight.device for m in pairs if not is_unit(m)):
        return "its parameters are on several devices"
    if any(isinstance(s, Tensor) and s.device != weight.device for s in _scalings(layer, names)):
        return "its scaling is a tensor on another device"
    if x is None and is_sharded(weight) and any(map(is_unit, pairs)):
        return None  # the unit around this layer settles the dtype of W in a call
    compute = dtype_in_passes(base)
    given = compute if x is None else x.dtype
    if torch.is_autocast_enabled(weight.device.type) and given != torch.float64:
        given = compute = torch.get_autocast_dtype(weight.device.type)
    accepted = (compute, torch.float32) if compute in HALF_DTYPES else (compute,)
    dtypes = dict.fromkeys(map(dtype_in_passes, pairs))
    if len(dtypes) > 1 or not set(dtypes) <= set(accepted):
        return f"its adapters are {' and '.join(map(str, dtypes))} beside {compute}"
    results = {dtype_given_out(module) for module in (base, *pairs)} - {None, compute}
    if results:
        return f"units of FSDP inside of it give out {results.pop()}"
    if not layer.cast_input_dtype_enabled and dtypes.keys() != {given}:
        return "the cast of its input is disabled"
    if x is None:
        return None
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"an input of type {type(x).__name__}"
    if given != compute or x.device != weight.device:
        return f"an input of {x.dtype} on {x.device}"
    return None


def _why_not_quantised(
    layer: "LoraLayer", base: Any, form: QuantisedFormat, names: list[str], x: Tensor | None
) -> str | None:
    """As `_why_not_tensors`, on a base layer of few bits, which takes inputs of any dtype."""
    weight = form.weight_of(base)
    if isinstance(weight, str):
        return f"of its base layer, {weight}"
    if base.weight.requires_grad:
        return "its base weight is trained"
    pairs = [m[name] for name in names for m in (layer.lora_A, layer.lora_B)]
    for module in (base, *pairs):  # FSDP makes those of the unit around this layer whole in a call
        whole = not is_sharded(module.weight) or (x is None and becomes_whole(module))
        if not whole or (is_unit(module) and module is not base):
            return "its parameters are no whole tensors"
    if any(module.weight.device != weight.device for module in pairs):
        return "its parameters are on several devices"
    if any(isinstance(s, Tensor) and s.device != weight.device for s in _scalings(layer, names)):
        return "its scaling is a tensor on another device"
    compute = form.compute_dtype(base, x)
    given = compute if x is None else x.dtype
    if given not in KERNEL_DTYPES:
        return f"an input of {given}"
    dtypes = {module.weight.dtype for module in pairs}
    if len(dtypes) > 1 or not dtypes <= {compute, torch.float32}:
        return f"its adapters are {' and '.join(map(str, dtypes))} beside {compute}"
    if not layer.cast_input_dtype_enabled and dtypes != {given}:
        return "the cast of its input is disabled"
    rank = sum(layer.lora_A[name].weight.shape[0] for name in names)
    dropout = sum(dropout_of(layer, name) for name in names)
    # A layer that `fuse_` has not seen yet has no backend; `swap_` asks for one then.
    if hasattr(layer, "backend") and not form.runs_fused(
        weight, compute, rank, dropout, layer.backend
    ):
        if x is not None:
            return "its quantised weight"
        return form.path(base, rank, dropout, layer.backend).reason
    if x is not None and type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"an input of type {type(x).__name__}"
    if x is not None and x.device != weight.device:
        return f"an input on {x.device}"
    return None


def _scalings(layer: "LoraLayer", names: list[str]) -> list[float | Tensor]:
    return [layer.scaling[name] for name in names]
