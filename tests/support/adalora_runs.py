"""A small model that AdaLoRA trains, beside its eager base."""

import torch
from torch import nn

from deltadiff.optim.adalora import swap_adalora_

SCHEDULE = {"total_step": 12, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2}


def base(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 6)
    return nn.Sequential(*layers).to(dtype)


def swapped(dtype=torch.float64, **options) -> nn.Sequential:
    model = base(dtype)
    swap_adalora_(model, init_r=4, seed=1, **options)
    return model


def data(step: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    make = dict(generator=generator, dtype=torch.float64)
    return torch.randn(16, 12, **make).to(dtype), torch.randn(16, 6, **make).to(dtype)


def loss_of(model, step: int) -> torch.Tensor:
    x, y = data(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) + optimizer.orthogonality()).backward()
        optimizer.step()
