"""What changes on a device in the iteration in which the updates of W start."""

import pytest
import torch
from delta_lora_runs import W_UPDATES, trainable
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.update_start import RankScales


def make_model() -> nn.Sequential:
    """Layers of two ranks and two dtypes, which are not run after one another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 16).double(), nn.Linear(16, 8))
    swap_(model, r=4, target_modules=["0", "1"], seed=1)
    swap_(model, r=2, target_modules=["2"], seed=2)
    return model


def run(model, params, optimizers, steps: int) -> list[list[list[float]]]:
    """Steps with given gradients; returns the factors of every layer after each."""
    found = []
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for optimizer in optimizers:
            optimizer.step()
        found.append([m.delta.rank_scale.tolist() for m in lora_layers(model).values()])
    return found


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_factors_change_when_the_first_update_is_in(w_update):
    """From 1 and 0 to 1 + lambda and -lambda after iteration K + 1, for each group's own K."""
    model = make_model()
    groups = [{"params": m, "start_step": k} for m, k in zip(model, (0, 2, 1), strict=True)]
    optimizer = DeltaLoRA(groups, lr=1e-2, update_ratio=0.5, w_update=w_update)
    found = run(model, trainable(model), [optimizer], steps=6)
    for t, factors in enumerate(found):
        for k, r, own in zip((0, 2, 1), (4, 4, 2), factors, strict=True):
            started = t > k
            assert own == ([1.5] * r + [-0.5] * r if started else [1.0] * r + [0.0] * r)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_layers_of_several_dtypes_and_ranks_step_as_if_each_were_alone(w_update):
    results = []
    for together in (True, False):
        model = make_model()
        options = {"lr": 1e-2, "update_ratio": 0.5, "start_step": 1, "w_update": w_update}
        parts = [model] if together else list(model)
        optimizers = [DeltaLoRA(part, **options) for part in parts]
        run(model, trainable(model), optimizers, steps=6)
        results.append([*model.parameters(), *(m.delta.rank_scale for m in model)])
    assert all(map(torch.equal, *results))


def test_each_vector_of_factors_starts_a_cache_line():
    scales = RankScales([8, 130, 2], torch.float32, torch.device("cpu"))
    assert [(p.start, p.stop) for p in scales.places] == [(0, 8), (64, 194), (256, 258)]
    assert scales.now.shape == scales.after.shape == scales.from_iteration.shape == (320,)
