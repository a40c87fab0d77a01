"""What reaches W: 16-bit weights, quantised and shared ones, changes of lambda."""

import warnings

import pytest
import torch
from delta_lora_runs import W_UPDATES, batch, make_model, train
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops.reference import join_remainder

ROUNDINGS = ["remainder", "stochastic", "nearest"]


def test_factored_refuses_endless_changes_of_update_ratio_before_changing_anything():
    model = make_model()
    optimizer = DeltaLoRA(model, update_ratio=0.5, w_update="factored")
    with pytest.raises(ArgumentError, match="update_ratio: got .* at most 8 changes"):
        train(model, optimizer, 20, ratio_at=lambda t: 0.5 + t)
    assert len(model[0].delta.past_updates) == 8


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_share_of_the_update_that_reaches_a_bfloat16_weight(rounding):
    """remainder: all; stochastic: all on average; nearest: little (design: 1.5 % at 1e-5)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
    nn.init.normal_(model[0].weight, std=0.02)
    swap_(model, r=8, lora_alpha=16)
    nn.init.normal_(model[0].lora_B, std=0.02)
    layer, w0 = model[0], model[0].weight.detach().float()
    optimizer = DeltaLoRA(
        model, lr=1e-5, weight_decay=0, update_ratio=1.0, rounding=rounding, seed=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            layer.lora_A.grad = torch.randn_like(layer.lora_A)
            layer.lora_B.grad = torch.randn_like(layer.lora_B)
            optimizer.step()
    delta = layer.delta
    wanted = layer.scaling * (layer.lora_B @ layer.lora_A - delta.anchor_B @ delta.anchor_A)
    got = layer.weight.float() - w0
    if rounding == "remainder":
        got = join_remainder(layer.weight.detach(), delta.remainder) - w0
        assert (got - wanted).norm() / w0.norm() < 1e-7
    share = ((got * wanted).sum() / wanted.square().sum()).item()
    low, high = {"remainder": (0.9999, 1.0001), "stochastic": (0.8, 1.2), "nearest": (0, 0.1)}[
        rounding
    ]
    assert low < share < high


def test_quantised_weight_is_served_by_factored_and_refused_in_place():
    class Int8Linear(nn.Linear):
        """A stand-in for a quantised layer: int8 weight, its own forward."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    model = nn.Sequential(Int8Linear(12, 10))
    q = (torch.randn(10, 12) * 16).to(torch.int8)
    model[0].weight = nn.Parameter(q, requires_grad=False)
    report = swap_(model, r=2)
    assert "base layer's own product" in report.rows[0].reason
    with pytest.raises(ArgumentTypeError, match="weight of 0.*quantised"):
        DeltaLoRA(model)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update="factored")
    x, y = torch.randn(16, 12), torch.randn(16, 10)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model[0].weight, q)


def tied_model():
    model = nn.Sequential()
    model.embed, model.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_tied_and_shared_weights_are_refused_in_place_only():
    model = tied_model()
    swap_(model, r=2, target_modules=["head"])
    with pytest.raises(ArgumentError, match="weight of head: got shared by embed, head"):
        DeltaLoRA(model)
    DeltaLoRA(model, w_update="factored")
    two = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    two[1].weight = two[0].weight
    swap_(two, r=2)
    with pytest.raises(ArgumentError, match="shared by 0, 1"):
        DeltaLoRA(two)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_gpu_step_never_waits_for_the_device(w_update, rounding):
    model = make_model(torch.bfloat16, "cuda")
    optimizer = DeltaLoRA(
        model, lr=1e-2, update_ratio=1.0, w_update=w_update, rounding=rounding, skip_nonfinite=True
    )
    x, y = batch(0, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(6):
            torch.cuda.set_sync_debug_mode("error" if t > 2 else "default")
            try:
                (model(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
