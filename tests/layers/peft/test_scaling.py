"""PEFT's scale of an adapter, and Delta-LoRA's update beside it, which keeps its own."""

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_cases import lora
from peft_checks import fused_calls
from peft_models import input_of, output_of

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_

X, W_UPDATES = input_of("mlp"), ["factored", "inplace"]
SCALING, RATIO = 3.0, 0.5  # lora_alpha / r of the cases, and lambda


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        output_of(model, X).square().mean().backward()
        optimizer.step()


def trained(w_update, model="mlp"):
    """A model of PEFT trained by Delta-LoRA, its layers, and W of each before."""
    model = lora(model).build()
    swap_(model)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=RATIO, w_update=w_update)
    train(model, optimizer)
    return model, optimizer, layers, before


def pair_of(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def weight_of(layer, before, scaling):
    """What W with its branch must be: the update at the scale of its run, the pair at its own."""
    (a, b), delta = (p.detach() for p in pair_of(layer)), layer.deltas["default"]
    update = RATIO * SCALING * (b @ a - delta.anchor_B @ delta.anchor_A)
    product = update + scaling * (b @ a)
    return before + (product.T if layer.fan_in_fan_out else product)


def check(layers, before, scaling):
    """Outputs and gradients of each layer, and what PEFT would merge."""
    for layer, w in zip(layers, before, strict=True):
        base, (a, b) = layer.get_base_layer(), pair_of(layer)
        x = torch.randn(4, layer.in_features, dtype=torch.float64)
        wanted = weight_of(layer, w, scaling)
        matrix = wanted.T if layer.fan_in_fan_out else wanted
        with fused_calls(layer) as calls:
            y = layer(x)
        assert calls.total() == 1
        torch.testing.assert_close(y, x @ matrix.T + base.bias, rtol=1e-12, atol=1e-12)
        a.grad = b.grad = None
        y.sum().backward()
        ones = torch.ones_like(y)  # Algorithm 1: the update of W is a constant to autograd
        torch.testing.assert_close(b.grad, scaling * ones.T @ (x @ a.T), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.grad, scaling * (ones @ b).T @ x, rtol=1e-12, atol=1e-12)
        merged = base.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(merged, wanted, rtol=1e-12, atol=1e-12)


CALLS = {
    "set_scale": (lambda m: m.set_scale("default", 0.25), 0.25),
    "set_scale 0": (lambda m: m.set_scale("default", 0.0), 0.0),
    "set_scale below 0": (lambda m: m.set_scale("default", -0.5), -0.5),
    "scale_layer": (lambda m: m.scale_layer(2.0), 2.0),
    "unscale_layer": (lambda m: m.unscale_layer(4.0), 0.25),
    "there and back": (lambda m: (m.scale_layer(2.0), m.unscale_layer()), 1.0),
    "written": (lambda m: m.scaling.update(default=SCALING / 2), 0.5),
    "a tensor": (lambda m: m.scaling.update(default=torch.tensor(2 * SCALING)), 2.0),
}


@pytest.mark.parametrize("model", ["mlp", "conv1d stack"])
@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("name", CALLS)
def test_a_new_scale_leaves_the_update_of_w(name, w_update, model):
    call, factor = CALLS[name]
    _, _, layers, before = trained(w_update, model)
    check(layers, before, SCALING)
    for layer in layers:
        call(layer)
    check(layers, before, factor * SCALING)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_pefts_context_that_scales_all_layers(w_update):
    model, _, layers, before = trained(w_update)
    with rescale_adapter_scale(model, 0.5):
        check(layers, before, 0.5 * SCALING)
    check(layers, before, SCALING)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_model_that_is_prepared_for_hot_swapping(w_update):
    model, _, layers, before = trained(w_update)
    prepare_model_for_compiled_hotswap(model)
    check(layers, before, SCALING)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_run_goes_on_with_the_scale_that_it_began_with(w_update):
    model, optimizer, layers, before = trained(w_update)
    for layer in layers:
        layer.set_scale("default", 2.0)
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(model, optimizer)
    check(layers, before, 2 * SCALING)
    saved = optimizer.state_dict()
    train(model, optimizer, 1)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    if w_update == "inplace":
        check(layers, before, 2 * SCALING)


def test_a_state_holds_the_scale_of_the_update():
    model, _, layers, before = trained("factored")
    for layer in layers:
        layer.set_scale("default", 2.0)
    state, other = model.state_dict(), lora().build()
    swap_(other)
    other.load_state_dict(state)
    found = [m for m in other.modules() if isinstance(m, peft.tuners.lora.Linear)]
    check(found, before, SCALING)
    assert [m.deltas["default"].scaling for m in found] == [SCALING] * 2


def test_our_own_layers_too(tmp_path):
    """`LoraLinear.scaling` may be changed as well, and an adapter file holds both scales."""
    torch.manual_seed(0)
    base = torch.nn.Linear(8, 6, dtype=torch.float64)
    model = torch.nn.Sequential(base)
    swap_(model, r=2, lora_alpha=6, seed=0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=RATIO, w_update="factored"))
    layer = model[0]
    layer.scaling = SCALING / 4
    (b, a), delta = (p.detach() for p in (layer.lora_B, layer.lora_A)), layer.delta
    update = RATIO * SCALING * (b @ a - delta.anchor_B @ delta.anchor_A)
    wanted = base.weight.detach() + update + layer.scaling * b @ a
    wanted = X @ wanted.T + base.bias.detach()
    torch.testing.assert_close(model(X).detach(), wanted, rtol=1e-12, atol=1e-12)
    save_adapter(model, tmp_path)
    again = torch.nn.Sequential(torch.nn.Linear(8, 6, dtype=torch.float64))
    again.load_state_dict({"0.weight": base.weight, "0.bias": base.bias})
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(X).detach(), wanted, rtol=1e-12, atol=1e-12)
    merge_(model)
    torch.testing.assert_close(model(X).detach(), wanted, rtol=1e-12, atol=1e-12)


def test_a_run_that_begins_at_scale_0_keeps_the_update_of_the_last_one():
    model, _, layers, before = trained("factored")
    wanted = [weight_of(layer, w, 0.0) for layer, w in zip(layers, before, strict=True)]
    for layer in layers:
        layer.set_scale("default", 0.0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=RATIO), 1)
    for layer, w in zip(layers, wanted, strict=True):
        assert layer.deltas["default"].past_updates
        x = torch.randn(4, layer.in_features, dtype=torch.float64)
        y = x @ w.T + layer.base_layer.bias
        torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
