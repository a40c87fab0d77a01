"""Dropout of PEFT's adapters is fused: other masks than PEFT's, of the same probability."""

import pytest
import torch
from peft_cases import lora
from peft_checks import fused_calls, swap_quietly
from peft_models import input_of, output_of
from torch import nn

P, PASSES = 0.3, 4000


def layers(p=P, dtype=torch.float64):
    """The first layer of a model as PEFT runs it, and swapped."""
    models = [lora(lora_dropout=p, target_modules=["lin0"]).build(dtype) for _ in range(2)]
    swap_quietly(models[1])
    return [model.base_model.model.lin0 for model in models]


def test_evaluation_has_no_dropout_and_equals_pefts():
    plain, swapped = (layer.eval() for layer in layers())
    x = input_of("mlp")
    with fused_calls(swapped) as calls:
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-12, atol=1e-12)
    assert calls.total() == 1


def test_training_is_one_fused_call_with_a_new_mask_each():
    _, swapped = layers()
    x = input_of("mlp")
    with fused_calls(swapped) as calls:
        torch.manual_seed(0)
        first, second = swapped(x), swapped(x)
        torch.manual_seed(0)
        assert torch.equal(swapped(x), first) and not torch.equal(first, second)
    assert calls.total() == 3


def test_mean_and_deviation_are_pefts():
    """Over many masks, both moments of y and the mean of the gradient of A agree with theory.

    y = y_0 + s B A m(x) with m(x)_k = x_k / (1 - p) with probability 1 - p, else 0, so that y has
    mean y_0 + s B A x and variance p / (1 - p) sum_k (s B A)_k^2 x_k^2.
    """
    x = input_of("mlp")[:1]
    many = x.expand(PASSES, -1)
    for layer in layers():
        torch.manual_seed(1)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = layer.scaling["default"] * b @ a
        mean = layer.base_layer(x) + x @ product.T
        variance = P / (1 - P) * (x.square() @ product.square().T)
        y = layer(many)
        error = (y.mean(0) - mean) / (variance / PASSES).sqrt()
        assert error.abs().max() < 5  # standard errors
        assert (y.var(0) / variance - 1).abs().max() < 0.2
        a.grad = None
        y.mean(0).sum().backward()
        wanted = (layer.scaling["default"] * b.sum(0))[:, None] * x
        deviation = wanted.abs() * (P / (1 - P) / PASSES) ** 0.5
        assert ((a.grad - wanted) / deviation).abs().max() < 5


def test_the_mask_drops_the_share_that_peft_drops():
    """With A the identity and B = 1, the branch shows the mask itself."""
    for layer in layers(dtype=torch.float32):
        with torch.no_grad():
            layer.base_layer.weight.zero_(), layer.base_layer.bias.zero_()
            layer.lora_A["default"].weight = nn.Parameter(torch.eye(8))
            layer.lora_B["default"].weight = nn.Parameter(torch.eye(12, 8))
            layer.scaling["default"] = 1.0
            torch.manual_seed(2)
            y = layer(torch.ones(PASSES, 8))[:, :8]
        kept = y != 0
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - P)))
        deviation = (P * (1 - P) / kept.numel()) ** 0.5
        assert abs(kept.double().mean().item() - (1 - P)) < 5 * deviation


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends(p):
    """PEFT puts no dropout for 0; for 1 the branch is 0, which PEFT's own forward pass computes."""
    plain, swapped = layers(p)
    x = input_of("mlp")
    with fused_calls(swapped) as calls:
        torch.testing.assert_close(swapped(x), plain(x), rtol=1e-12, atol=1e-12)
    assert calls.total() == (1 if p == 0 else 0)


def test_a_model_with_dropout_trains_through_fused_calls():
    model = lora("llama", lora_dropout=0.1).build(torch.float32)
    swap_quietly(model)
    with fused_calls(model) as calls:
        output_of(model, input_of("llama")).square().mean().backward()
    assert len(calls) == calls.total() == 6
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
