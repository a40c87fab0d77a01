"""The check that base weights may be written in place."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError
from ..ranks import is_partitioned, is_sharded, local, why_no_shard
from .base_format import base_format
from .lora_layers import LoraLayer


def check_writable(layers: Mapping[str, LoraLayer], models: list[nn.Module]) -> None:
    """Raise unless W of every layer can be updated in place without changing anything else.

    Args:
        layers: the layers whose W is to be written, by name.
        models: all modules that might hold a parameter in the same memory.

    Raises:
        ArgumentTypeError: a weight whose format cannot be written, or that is no whole tensor.
        ArgumentError: a weight that shares its memory with another module or with itself.
    """
    holders: dict[int, dict[int, str]] = {}  # memory -> the modules that hold a parameter in it
    for model in models:
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                holders.setdefault(_memory(p), {}).setdefault(id(module), name)
    for name, layer in layers.items():
        w, argument = layer.weight, f"weight of {name}"
        if not base_format(layer.holder).writable:
            accepted = "float weights in place; else w_update='factored'"
            raise ArgumentTypeError(argument, f"{w.dtype} (quantised)", accepted)
        if is_partitioned(w):
            given = "parameters that DeepSpeed's ZeRO-3 has partitioned"
            raise ArgumentTypeError(argument, given, "DDP or `fully_shard` for an update in place")
        reason = why_no_shard(w)
        if reason is not None or w.numel() == 0:
            given = reason or f"{type(w).__name__} of shape {tuple(w.shape)}"
            accepted = "a whole weight, or one that `fully_shard` splits by its rows"
            raise ArgumentTypeError(argument, given, accepted)
        if any(is_sharded(p) != is_sharded(w) for p in (layer.lora_A, layer.lora_B)):
            split, kept = ("W", "its pair") if is_sharded(w) else ("its pair", "W")
            given = f"{split} split over processes and {kept} not, as by tensor parallelism"
            raise ArgumentTypeError(argument, given, "both by `fully_shard`, or neither")
        if 0 in local(w).stride():
            raise ArgumentError(argument, f"strides {w.stride()}", "a weight with its own memory")
        same = {n for m, n in holders.get(_memory(w), {}).items() if m != id(layer.holder)}
        same |= {n for n, m in layers.items() if _memory(m.weight) == _memory(w)}
        if len(same) > 1:
            given = f"shared by {', '.join(sorted(same))}"
            accepted = "a weight of its own in place; else w_update='factored'"
            raise ArgumentError(argument, given, accepted)


def _memory(t: Tensor) -> int:
    """A number that is the same for tensors that lie in the same memory."""
    try:
        return local(t).untyped_storage().data_ptr() or id(t)
    except RuntimeError:  # torchao's tensors are made of others, and have no memory of their own
        return id(t)
