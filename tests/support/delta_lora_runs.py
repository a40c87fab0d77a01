"""A small swapped model, and training runs of it that are functions of the step."""

import torch
from torch import Tensor, nn

from deltadiff import swap_

W_UPDATES = ["inplace", "factored"]


def make_model(dtype=torch.float64, device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).to(device, dtype)
    swap_(model, r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=["4"], seed=1)
    return model


def make_peft_model(dtype=torch.float64, device="cpu") -> nn.Module:
    """The same layers with PEFT's pairs on them, swapped."""
    import peft

    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=["4"])
    model = peft.get_peft_model(nn.Sequential(*layers).to(device, dtype), config)
    swap_(model)
    return model


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(t: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    like = next(p for p in model.parameters() if p.dim() == 2)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (12, 3))
    return x.to(like), y.to(like)


def loss_of(model: nn.Module, t: int) -> Tensor:
    x, y = batch(t, model)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps, ratio_at=None, start=0, lr_at=None) -> list[float]:
    losses = []
    for t in range(start, start + steps):
        if lr_at:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(t)
        if ratio_at:
            for group in optimizer.param_groups:
                group["update_ratio"] = ratio_at(t)
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(10_000, model)[0])


def snapshot(model, optimizer) -> list[Tensor]:
    """Copies of all tensors of a model and of its optimizer's state."""
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    return [t.detach().clone() for t in [*model.parameters(), *state]]
