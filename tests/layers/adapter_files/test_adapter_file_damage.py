"""Whatever happens to the bytes of a saved adapter is noticed, or changes nothing."""

import random

import pytest
import torch
from damaged_files import damage
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, save_adapter, swap_
from deltadiff.errors import CheckpointError
from deltadiff.layers.lora_layers import lora_layers


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


@torch.no_grad()
def output(model) -> torch.Tensor:
    return model(torch.linspace(-1, 1, 12).view(2, 6))


def save_trained(folder) -> torch.Tensor:
    """Write an adapter; returns what its model gives."""
    model = base()
    swap_(model, r=2, target_modules=["0"], modules_to_save=["2"], seed=0)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
    save_adapter(model, folder)
    fresh = base()
    load_adapter(fresh, folder)
    return output(fresh)


@pytest.mark.check(short=10, long=1000)
def test_any_damage_is_refused_or_harmless(seed, tmp_path):
    random_ = random.Random(seed)
    expected = save_trained(tmp_path)
    path = random_.choice(sorted(tmp_path.iterdir()))
    path.write_bytes(damage(path.read_bytes(), random_))
    fresh = base()
    before = output(fresh)
    try:
        load_adapter(fresh, tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        assert not lora_layers(fresh) and torch.equal(output(fresh), before)
    else:  # white space of the JSON for instance
        assert torch.equal(output(fresh), expected)
