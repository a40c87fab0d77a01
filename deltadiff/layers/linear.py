"""The linear layers that can be swapped: ``nn.Linear`` and transformers' `Conv1D`."""

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`: GPT-2's linear layer, its weight stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear`` or a `Conv1D`."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features
