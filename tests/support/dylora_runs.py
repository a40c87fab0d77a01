"""A small model that DyLoRA trains, beside its eager base."""

import torch
from torch import nn

from deltadiff import swap_
from deltadiff.layers.lora_layers import lora_layers

R, ALPHA = 6, 3.0


def base(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def swapped(dtype=torch.float64, **options) -> nn.Sequential:
    """The model with pairs that are not at their start, so that every row matters."""
    model = base(dtype)
    swap_(model, r=R, lora_alpha=ALPHA, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for m in lora_layers(model).values():
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=generator) / 4)
    return model


def data(step: int, dtype=torch.float64):
    make = dict(generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64)
    return torch.randn(16, 12, **make).to(dtype), torch.randn(16, 8, **make).to(dtype)


def loss_of(model, step: int) -> torch.Tensor:
    x, y = data(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps) -> list[int]:
    """Train; returns the ranks of the steps."""
    drawn = []
    for step in steps:
        drawn.append(optimizer.rank)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return drawn
