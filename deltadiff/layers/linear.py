"""The layers that can be swapped: ``nn.Linear``, transformers' `Conv1D`, PEFT's LoRA layers."""

from torch import nn

from ..errors import ArgumentError


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`: GPT-2's linear layer, its weight stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_peft(module: nn.Module) -> bool:
    """Whether this is one of PEFT's LoRA layers."""
    kind = type(module)
    return kind.__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear`` or a `Conv1D`."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def check_rank(argument: str, rank: int, name: str, module: nn.Module) -> None:
    """Raise ArgumentError unless the linear layer called ``name`` can have a pair of this rank."""
    n, k = linear_shape(module)
    if not 1 <= rank <= min(n, k):
        accepted = f"1 to {min(n, k)}, the smaller side of {name} {n} x {k}"
        raise ArgumentError(argument, rank, accepted)
