"""What the optimizers accept as parameters and as param groups."""

import pytest
import torch
from delta_lora_runs import loss_of, make_model, trainable
from torch import nn

from deltadiff import DeltaLoRA, FusedAdamW
from deltadiff.errors import ArgumentError, ArgumentTypeError


def test_a_model_its_parts_and_its_parameters_are_the_same_parameters():
    results = []
    for given in (
        lambda m: m,
        trainable,
        lambda m: [m[0], m[2], *m[4].parameters()],
        lambda m: [{"params": m[0]}, {"params": [*trainable(m[2]), *m[4].parameters()]}],
        lambda m: iter(trainable(m)),
    ):
        model = make_model()
        optimizer = FusedAdamW(given(model), lr=1e-2)
        loss_of(model, 0).backward()
        optimizer.step()
        results.append(list(model.parameters()))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kind", [DeltaLoRA, FusedAdamW])
@pytest.mark.parametrize("given", [3, "model", [3], [{"lr": 1.0}]])
def test_bad_model_or_params(given, kind):
    with pytest.raises(ArgumentTypeError, match="model_or_params"):
        kind(given)


def test_parameters_without_swapped_layers_are_refused():
    with pytest.raises(ArgumentError, match="update_ratio=0"):
        DeltaLoRA(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="update_ratio=0"):
        DeltaLoRA(list(make_model().parameters()))
    model = make_model()
    with pytest.raises(ArgumentError, match="lora_A and lora_B of 0 not both"):
        DeltaLoRA([model[0].lora_A], model=model)


@pytest.mark.parametrize("kind", [DeltaLoRA, FusedAdamW])
def test_parameters_that_kernels_cannot_write_are_refused(kind):
    model = make_model()
    model[4].bias = nn.Parameter(torch.empty(0))
    with pytest.raises(ArgumentTypeError, match="not empty"):
        kind(model)
    for strange in (torch.zeros(4, 4).T[:2], torch.zeros(3, dtype=torch.complex64)):
        model[4].bias = nn.Parameter(strange)
        with pytest.raises(ArgumentTypeError, match="contiguous tensors of"):
            kind(model)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ArgumentError, match="Linear without trainable parameters"):
        FusedAdamW(nn.Linear(3, 3).requires_grad_(False))
