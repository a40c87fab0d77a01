"""Weights that may be written in place."""

from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError
from .lora_linear import LoraLinear


def check_writable(layers: dict[str, LoraLinear], models: list[nn.Module]) -> None:
    """Raise unless W of every layer can be updated in place without changing anything else."""
    holders: dict[int, dict[int, str]] = {}  # storage -> modules that hold a parameter in it
    for model in models:
        for name, module in model.named_modules():
            for p in module.parameters(recurse=False):
                holders.setdefault(_storage(p), {}).setdefault(id(module), name)
    for name, layer in layers.items():
        w, argument = layer.weight, f"weight of {name}"
        if layer.quantised:
            raise ArgumentTypeError(
                argument,
                f"{w.dtype} (quantised)",
                "float weights in place; else w_update='factored'",
            )
        if hasattr(w, "device_mesh") or w.numel() == 0:
            given = f"{type(w).__name__} of shape {tuple(w.shape)}"
            raise ArgumentTypeError(argument, given, "a whole tensor (no DTensor, no shard)")
        if 0 in w.stride():
            raise ArgumentError(argument, f"strides {w.stride()}", "a weight with its own memory")
        same = {**holders.get(_storage(w), {})}
        same |= {id(m): n for n, m in layers.items() if _storage(m.weight) == _storage(w)}
        if len(same) > 1:
            given = f"shared by {', '.join(sorted(same.values()))}"
            accepted = "a weight of its own in place; else w_update='factored'"
            raise ArgumentError(argument, given, accepted)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() or id(t)
