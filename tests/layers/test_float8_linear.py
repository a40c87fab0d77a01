"""`Float8Linear` by itself, as `quantise_` makes it."""

import pytest
import torch
from fp8 import dense_of, float8_linear, fp8_linear
from tolerance import relative_error

BF16 = torch.bfloat16
N, K = 150, 140


@pytest.mark.filterwarnings("ignore")
def test_our_layer_alone(randn):
    layer = float8_linear(N, K)
    dense, x = dense_of(layer), randn(2, 3, K).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (layer, compiled):
        ours, wide = x, x.detach().double().requires_grad_()
        y, expected = call(ours), dense(wide)
        assert relative_error(y, expected) < 2e-6
        found = torch.autograd.grad(y.square().sum(), (ours, layer.bias))
        truth = torch.autograd.grad(expected.square().sum(), (wide, dense.bias))
        assert all(relative_error(f, t) < 2e-6 for f, t in zip(found, truth, strict=True))
    first = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x)[0]
    first = torch.autograd.grad(dense(wide).sin().sum(), wide, create_graph=True)[0]
    truth = torch.autograd.grad(first.square().sum(), wide)[0]
    assert relative_error(second, truth) < 5e-6
    assert "block_size=(128, 128)" in repr(layer)
    layer.to(BF16)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.bias.dtype == BF16


def test_transforms(randn):
    layer, x = float8_linear(N, K), randn(3, K)
    dense = dense_of(layer)
    found = torch.func.vmap(torch.func.grad(lambda row: layer(row).sin().sum()))(x)
    truth = torch.func.grad(lambda x: dense(x).sin().sum())(x.double())
    assert relative_error(found, truth) < 2e-6


def test_what_is_saved_is_the_format_of_checkpoints():
    ours, theirs = float8_linear(N, K), fp8_linear(N, K, seed=1)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(dense_of(theirs).weight, dense_of(ours).weight)
