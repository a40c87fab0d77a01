"""Small models with FLoRA's cores, which start from values that are not 0."""

import torch
from adalora_runs import base
from torch import nn

from deltadiff.layers.flora import swap_flora_
from deltadiff.layers.lora_layers import lora_layers


def draw_cores(model: nn.Module) -> nn.Module:
    """Fill the cores, so that a fault in any place of one changes the model."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.gate.copy_(torch.randn(layer.gate.shape, generator=generator))
    return model


def swapped(dtype=torch.float64, **options) -> nn.Sequential:
    """`adalora_runs.base` with cores; its layers widen, keep and narrow what they get."""
    model = base(dtype)
    swap_flora_(model, **{"r": 4, "seed": 1, **options})
    return draw_cores(model)
