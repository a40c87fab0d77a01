"""`why_not_linear`: what counts as a linear layer, and why something else does not.

`swap_` puts another module in the place of a layer. That is right where the layer does no more than
multiply its input by a whole, ordinary weight: whatever else it does would be dropped in silence.
A quantised layer with a forward pass of its own is called as it is, so that neither this forward
pass nor a hook is lost, except where `lora_linear` is known to compute the same (see `four_bit`).
One in FP8 is always decoded (see `fp8`), so it must be as plain as one of ordinary numbers.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...checks import DTYPES, dtype_name
from ...ops.decode_fp8 import is_fp8
from ...ranks import is_partitioned, is_sharded, why_no_shard
from ..four_bit import is_four_bit
from ..fp8 import SCALES, is_fp8_layer, stores_fp8, why_not_fp8
from ..linear import is_conv1d, linear_shape
from ..lora_linear import LoraLinear
from .weight_readers import find_readers

if TYPE_CHECKING:
    from ..linear import LinearLayer

# The dtypes in which bitsandbytes and its like store the bytes of a quantised weight.
_BYTES = (torch.int8, torch.uint8)
# Classes of transformers whose own forward pass is that of nn.Linear: Falcon's rounds the product
# before it adds the bias.
_SAME_PRODUCT = {"FalconLinear"}
_ON_META = "its weight is on meta: not loaded yet, or offloaded"


def is_linear(module: nn.Module) -> TypeGuard["LinearLayer"]:
    """Whether this is an ``nn.Linear`` or a `Conv1D`, and not swapped yet."""
    eager = isinstance(module, nn.Linear) and not isinstance(module, LoraLinear)
    return eager or is_conv1d(module)


def find_refused(model: nn.Module, on_meta: bool = True) -> dict[nn.Module, str]:
    """The linear layers of a model that `swap_` cannot take, with the reason.

    ``on_meta``: False leaves aside that a weight is on meta.
    """
    readers = find_readers(model)
    reasons = {m: why_not_linear(m, readers.get(m)) for m in model.modules() if is_linear(m)}
    return {
        m: reason
        for m, reason in reasons.items()
        if reason is not None and (on_meta or reason != _ON_META)
    }


def why_not_linear(module: nn.Module, bypassed: str | None = None) -> str | None:
    """None for a module that `swap_` can take as a linear layer, else the reason in words.

    Args:
        module: any module that is not swapped.
        bypassed: what `find_readers` says of the module.
    """
    kind = type(module).__name__
    if not is_linear(module):
        return f"{kind} is not an nn.Linear"
    w = module._parameters.get("weight")
    if "parametrizations" in module._modules:
        return "its weight or bias is computed by a parametrisation"
    if w is None or "bias" not in module._parameters:
        return "its weight or bias is no parameter but computed (weight_norm, pruning, FSDP, ...)"
    reason = _why_not_weight(module, w)
    if reason is None and (is_fp8(w) or w.dtype in DTYPES and not is_four_bit(w)):
        reason = _why_not_call(module)
    reason = reason or bypassed
    return _ON_META if reason is None and w.is_meta else reason


def _why_not_weight(module: "LinearLayer", w: Tensor) -> str | None:
    """The reason in the weight itself."""
    if is_lazy(w):
        return "a lazy layer, whose size the first batch settles"
    if is_tensor_parallel(module):
        return (
            "tensor parallelism (a tp_plan, `parallelize_module`) splits its weight: use DDP or "
            "`fully_shard` instead"
        )
    if is_sharded(w) or hasattr(w, "_fsdp_flattened"):  # FSDP 2 and 1
        return "its weight is sharded: call `swap_` before `fully_shard` or FSDP"
    if is_partitioned(w):
        return (
            "DeepSpeed's ZeRO-3 has partitioned its weight: call `swap_` before "
            "`deepspeed.initialize`, on a model made without `zero.Init`"
        )
    if w.numel() == 0:
        return "a weight of 0 elements: sharded, or with a side of 0"
    if (w.dtype in _BYTES or is_four_bit(w)) and _own_forward(module):
        return None
    if stores_fp8(module):
        return why_not_fp8(module)
    if w.dtype not in DTYPES:
        return f"its weight is {dtype_name(w.dtype)}, a format that cannot be taken"
    if type(w) is not nn.Parameter or w.layout is not torch.strided:
        stored = type(w).__name__ if w.layout is torch.strided else w.layout
        return f"its weight is stored as {stored}, a format that cannot be taken"
    if w.dim() != 2 or not is_conv1d(module) and tuple(w.shape) != linear_shape(module):
        return f"its weight has the shape {tuple(w.shape)}: sharded, or packed"
    return None


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether tensor parallelism splits the weight of a module that is called as a linear layer.

    It splits by rows as FSDP does, or by columns. But what joins the parts stands at the module
    itself; at a module that `fully_shard` took alone its class tells.
    """
    w = module._parameters.get("weight")
    if w is None or not is_sharded(w) or type(module).__name__.startswith("FSDP"):
        return False
    hooked = module._forward_pre_hooks or module._forward_hooks
    return bool(hooked) or "forward" in vars(module) or why_no_shard(w) is not None


def _why_not_call(module: "LinearLayer") -> str | None:
    """The reason in what a call of the module does beside the product."""
    if "_hf_hook" in vars(module):
        return (
            "accelerate's hook (device_map, offloading) would be dropped: call `swap_` before "
            "`dispatch_model`, or after `remove_hook_from_module(model, recurse=True)`"
        )
    if _own_forward(module):
        return f"{type(module).__name__} has a forward pass of its own"
    hooks = sorted(k.strip("_") for k, v in vars(module).items() if k.endswith("_hooks") and v)
    if hooks:
        return f"hooks on it would be dropped ({', '.join(hooks)})"
    tensors = {**module._parameters, **module._buffers, **module._modules}
    more = [name for name, held in tensors.items() if held is not None]
    known = ("weight", "bias", *(SCALES if is_fp8_layer(module) else ()))
    more = [name for name in more if name not in known]
    return f"it holds more than weight and bias: {', '.join(more)}" if more else None


def _own_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs other code than that of its kind of linear layer."""
    kind = type(module)
    of_instance = vars(module).get("forward")
    if of_instance is not None and of_instance != kind.forward.__get__(module):
        return True  # accelerate leaves the class's own there when its hook is removed
    plain = is_conv1d(module) or kind.forward is nn.Linear.forward or has_same_product(module)
    plain = plain or is_fp8_layer(module)
    return not plain or kind.__call__ is not nn.Module.__call__


def has_same_product(module: nn.Module) -> bool:
    """Whether the class of a module is known to compute what ``nn.Linear`` does."""
    kind = type(module)
    return kind.__name__ in _SAME_PRODUCT and kind.__module__.startswith("transformers.")
