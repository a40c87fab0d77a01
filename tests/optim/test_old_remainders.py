"""States of DeltaLoRA from versions that kept other remainders are read exactly."""

import copy

import pytest
import torch
from delta_lora_runs import make_model
from older_states import as_format_2
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltadiff import DeltaLoRA, swap_
from deltadiff.ops.reference import join_remainder

F16 = torch.float16


def make_conv1d_model(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(16, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    swap_(model, r=4)
    return model


def run(make, steps):
    """A model after some steps with random gradients, its optimizer, and its layers by number."""
    model = make(F16)
    optimizer = DeltaLoRA(model, lr=1e-3, update_ratio=0.5)
    for _ in range(steps):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.randn_like(p)
        optimizer.step()
    layers = {m.lora_B: m for u in optimizer.weight_updates for m in u.layers.values()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer, {i: layers[p] for i, p in enumerate(params) if p in layers}


@pytest.mark.parametrize("make", [make_model, make_conv1d_model])
def test_a_float16_remainder_is_read(make):
    optimizer, layers = run(make, 4)
    state, meant = copy.deepcopy(optimizer.state_dict()), {}
    for i, layer in layers.items():
        w = state["state"][i]["weight"]
        matrix = w.T if layer.transposed else w
        # As large as rounding errors are, and larger: some of the sums round to a neighbour of W.
        low = (matrix.float() * 2.0**-11 * torch.randn(matrix.shape)).to(F16)
        state["state"][i]["remainder"], meant[i] = low, matrix.float() + low.float()
    kept = copy.deepcopy(state)
    other, layers = run(make, 0)
    other.load_state_dict(state)
    for i, layer in layers.items():
        low = other.state[layer.lora_B]["remainder"]
        assert low.dtype == torch.int16
        joined, exact = join_remainder(layer.matrix.detach(), low), meant[i].abs() >= 2.0**-16
        assert torch.equal(joined[exact], meant[i][exact]) and exact.sum() > exact.numel() / 2
        assert ((joined - meant[i]).abs() <= 2.0**-40).all()
        of_state, of_copy = (s["state"][i] for s in (state, kept))
        for name in ("weight", "remainder"):  # the caller's state is as it was
            assert torch.equal(of_state[name], of_copy[name])


@pytest.mark.parametrize("form", [lambda state, _: state, as_format_2], ids=["bytes", "int16"])
@pytest.mark.parametrize("make", [make_model, make_conv1d_model])
def test_a_new_remainder_is_taken_as_it_is(make, form):
    optimizer, layers = run(make, 4)
    other, others = run(make, 0)
    state = optimizer.state_dict()
    for i, layer in layers.items():
        assert state["state"][i]["remainder"].dtype == torch.uint8
        assert state["state"][i]["remainder"].shape == (
            layer.weight.shape[0], 2 * layer.weight.shape[1],
        )  # fmt: skip
    other.load_state_dict(copy.deepcopy(form(state, optimizer)))
    for i, layer in layers.items():
        low, again = optimizer.state[layer.lora_B], other.state[others[i].lora_B]
        assert torch.equal(low["remainder"], again["remainder"]) and low["remainder"].any()
        assert torch.equal(layer.weight, others[i].weight)
