"""A run of DeltaLoRA over a float16 weight with its remainder is one over a float32 weight."""

import pytest
import torch
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ops.reference import join_remainder


def make(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 24))
    for layer in model:
        nn.init.normal_(layer.weight, std=0.05)
        layer.weight.data = layer.weight.data.half().to(dtype)
        layer.bias = None
    swap_(model, r=4, seed=1)
    for layer in lora_layers(model).values():
        assert layer.lora_A.dtype == torch.float32
    return model, DeltaLoRA(model, lr=1e-5, update_ratio=0.5)


@pytest.mark.check(short=1, long=10)
def test_1000_steps_are_those_of_a_float32_weight(seed, tally):
    """For the elements that never came below 2^-16, where 16 + 16 bits are not enough."""
    (narrow, first), (wide, second) = make(torch.float16), make(torch.float32)
    layers = list(zip(lora_layers(narrow).values(), lora_layers(wide).values(), strict=True))
    exact = [torch.ones(m.matrix.shape, dtype=torch.bool) for _, m in layers]
    start = [m.matrix.detach().clone() for _, m in layers]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        for pair in layers:
            for ours, theirs in zip(pair[0].adapter, pair[1].adapter, strict=True):
                ours.grad = torch.randn(ours.shape, generator=generator)
                theirs.grad = ours.grad.clone()
        first.step()
        second.step()
        for i, (_, theirs) in enumerate(layers):
            exact[i] &= theirs.matrix.detach().abs() >= 2.0**-16
    wrong = 0
    for i, (ours, theirs) in enumerate(layers):
        joined = join_remainder(ours.matrix.detach(), ours.delta.remainder)
        wrong += int((joined != theirs.matrix)[exact[i]].sum())
        off = 1000 * 2.0**-40 + 1000 * 2.0**-24 * theirs.matrix.abs()
        wrong += int(((joined - theirs.matrix).abs() > off).sum())
        assert exact[i].float().mean() > 0.9 and (joined != start[i]).all()
    tally("verify", "DeltaLoRA: float16 remainder against float32", 1000, wrong, dtype="float16")
    assert not wrong
