"""The importance of AdaLoRA's triplets, whatever the scale, the shapes and the addresses."""

import pytest
import torch
from adalora_runs import SCHEDULE, loss_of, swapped, train
from torch import nn

from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_


def test_importance_does_not_depend_on_the_gradient_scale():
    found = []
    for scale in (1.0, 1024.0):
        model = swapped(torch.float32)
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update(scale)
        found.append(optimizer.state[model[2].gate]["uncertainty"])
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-5)


@pytest.mark.parametrize("matter, kept", [((), ("0", "1")), (("1", "3"), ("1", "3"))])
def test_layers_of_one_shape_run_together_and_keep_their_order(matter, kept):
    """Places in the ranking are the model's, though layers are stacked by shape."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 6), (6, 8), (8, 8)]
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in shapes)).double()
    swap_adalora_(model, init_r=4, seed=0)
    optimizer = AdaLoRA(model, lr=0.0, weight_decay=0, total_step=1, target_r=2)
    for name, m in lora_layers(model).items():
        m.gate.data.fill_(2.0)
        for p in m.adapter:  # no gradient, so all are equal but those that matter
            p.grad = torch.zeros_like(p)
            optimizer.state[p]["sensitivity"].fill_(float(name in matter))
    optimizer.step()
    assert optimizer.ranks() == {name: 4 if name in kept else 0 for name in "0123"}
    assert torch.equal(model[1].gate, torch.full_like(model[1].gate, 2.0))


def test_parameters_that_move_keep_their_importance():
    results = []
    for moves in (False, True):
        model = swapped()
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        train(model, optimizer, range(5))
        if moves:
            for p in model.parameters():
                p.data = p.data.clone()
        train(model, optimizer, range(5, 14))
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))
