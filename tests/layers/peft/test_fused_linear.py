"""A pending update of Delta-LoRA counts whichever way a call of the layer takes.

The layers act as W_0 + s B A + lambda s (B A - B_k A_k); A and B get the gradients of plain LoRA.
"""

import copy

import peft
import pytest
import torch
from peft_cases import lora
from peft_checks import fused_calls
from peft_models import input_of, output_of
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import SwapError

RATIO, SCALING = 0.5, 3.0
W_UPDATES = ["factored", "inplace"]


def trained(w_update, kind="mlp", steps=3, **options):
    """The trained model, its first layer, and W of that layer before."""
    model = lora(kind, **options).build()
    swap_(model)
    layer = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear))
    before = layer.base_layer.weight.detach().clone()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=RATIO, w_update=w_update)
    for _ in range(steps):
        optimizer.zero_grad()
        output_of(model, input_of(kind)).square().mean().backward()
        optimizer.step()
    return model, layer, before


def update_of(layer):
    a, b = (m["default"].weight.detach() for m in (layer.lora_A, layer.lora_B))
    delta = layer.deltas["default"]
    if not delta.started():
        return torch.zeros_like(b @ a)
    return RATIO * SCALING * (b @ a - delta.anchor_B @ delta.anchor_A)


def check(layer, before, fused, others=()):
    """The output of the layer, and the gradients of its pair, against the formulas above."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update, x = update_of(layer), torch.randn(4, layer.in_features, dtype=torch.float64)
    w = before.T if layer.fan_in_fan_out else before
    w = w + update + SCALING * (b @ a).detach() + sum(others)
    with fused_calls(layer) as calls:
        y = layer(x)
    assert calls.total() == fused
    torch.testing.assert_close(y, x @ w.T + layer.base_layer.bias, rtol=1e-12, atol=1e-12)
    if not y.requires_grad:
        return
    a.grad = b.grad = None
    y.sum().backward()
    ones = torch.ones_like(y)
    torch.testing.assert_close(b.grad, SCALING * ones.T @ (x @ a.T), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.grad, SCALING * (ones @ b).T @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "conv1d stack"])
@pytest.mark.parametrize("w_update", W_UPDATES)
class TestWays:
    def test_fused(self, w_update, kind):
        _, layer, before = trained(w_update, kind)
        check(layer, before, 1)

    def test_before_the_first_update(self, w_update, kind):
        _, layer, before = trained(w_update, kind, steps=1)  # W is updated from t = 1 on
        assert not layer.deltas["default"].started()
        check(layer, before, 1)

    def test_pefts_own_forward(self, w_update, kind):
        _, layer, before = trained(w_update, kind)
        layer.base_layer.register_forward_hook(lambda module, args, y: None)
        check(layer, before, 0)

    def test_merged_and_unmerged(self, w_update, kind):
        model, layer, before = trained(w_update, kind)
        now = layer.base_layer.weight.detach().clone()
        model.merge_adapter()
        check(layer, before, 0)
        model.unmerge_adapter()
        check(layer, before, 1)
        if w_update == "inplace":
            assert torch.equal(layer.base_layer.weight, now)  # its very bits

    def test_beside_another_active_adapter(self, w_update, kind):
        model, layer, before = trained(w_update, kind)
        targets = model.peft_config["default"].target_modules
        model.add_adapter("b", peft.LoraConfig(r=3, target_modules=targets, fan_in_fan_out=True))
        nn.init.normal_(layer.lora_B["b"].weight)
        model.base_model.set_adapter(["default", "b"])
        other = layer.scaling["b"] * layer.lora_B["b"].weight @ layer.lora_A["b"].weight
        check(layer, before, 1, [other.detach()])
        layer.base_layer.register_forward_hook(lambda module, args, y: None)
        check(layer, before, 0, [other.detach()])

    def test_a_copy_and_a_move(self, w_update, kind):
        model, layer, before = trained(w_update, kind)
        twin = copy.deepcopy(layer)
        check(twin, before, 1)
        model.float().double()
        model.bfloat16()
        assert {p.dtype for p in twin.parameters()} == {torch.float64}
        check(twin, before, 1)

    def test_safe_merging(self, w_update, kind):
        model, layer, before = trained(w_update, kind)
        model.merge_adapter(safe_merge=True)
        check(layer, before, 0)


def test_an_update_of_one_of_two_trained_adapters():
    """Each adapter has an update of its own, and the forward pass adds those of the active ones."""
    model, layer, before = trained("factored")
    model.add_adapter("b", peft.LoraConfig(r=2, lora_alpha=6, target_modules=["lin0", "lin1"]))
    nn.init.normal_(layer.lora_B["b"].weight)
    first = update_of(layer)
    model.set_adapter("b")
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=RATIO)
    for _ in range(3):
        optimizer.zero_grad()
        output_of(model, input_of("mlp")).square().mean().backward()
        optimizer.step()
    a, b, delta = (layer.lora_A["b"].weight, layer.lora_B["b"].weight, layer.deltas["b"])
    second = RATIO * 3.0 * (b @ a - delta.anchor_B @ delta.anchor_A) + 3.0 * b @ a
    assert torch.equal(first, update_of(layer))
    model.base_model.set_adapter(["default", "b"])
    check(layer, before, 1, [second.detach()])
    model.set_adapter("default")
    check(layer, before, 1)


@pytest.mark.parametrize("kwargs", [{"adapter_names": ["default", "other", "__base__"]}])
def test_adapters_by_sample_are_refused_beside_an_update(kwargs):
    model, layer, _ = trained("factored")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    with pytest.raises(SwapError, match="adapter_names.*export_peft"):
        model.eval()(input_of("mlp"), **kwargs)
    assert layer.active_adapters == ["default"]


def test_dropout_beside_a_factored_update_is_refused():
    model, layer, _ = trained("factored")
    layer.lora_dropout["default"] = nn.Dropout(0.5)
    with pytest.raises(SwapError, match="lora_dropout.*export_peft"):
        layer(input_of("mlp"))
    layer.eval()
    layer(input_of("mlp"))
