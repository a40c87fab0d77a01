"""A small network, trained with Delta-LoRA, whose adapter a test saves."""

import torch
from torch import nn

from deltadiff import DeltaLoRA, swap_


def base(dtype=torch.float64) -> nn.Sequential:
    """The base network, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)


def train(model, optimizer, steps, ratio_at=lambda t: 0.5):
    """Train the network; ``ratio_at`` gives the update ratio of each step."""
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        for group in optimizer.param_groups:
            group["update_ratio"] = ratio_at(t)
        optimizer.zero_grad()
        model(x.to(model[0].weight.dtype)).square().mean().backward()
        optimizer.step()


def trained(w_update="inplace", dtype=torch.float64, **options):
    """The base network, swapped and trained, and its optimizer."""
    model = base(dtype)
    swap_(model, r=3, target_modules=["0"], modules_to_save=["2"], seed=0)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, 8, **options)
    return model, optimizer


def output(model) -> torch.Tensor:
    """What the network computes of a fixed input."""
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return model(x.to(next(model.parameters()).dtype))
