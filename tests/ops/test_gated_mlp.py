"""`gated_mlp` on every backend, against float64, and what it keeps for its backward pass."""

import pytest
import torch
from lora_linear_calls import kept_by

from deltadiff.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from deltadiff.ops.gated_mlp import gated_mlp
from deltadiff.ops.gated_product import gated_product, gated_product_bwd
from deltadiff.ops.reference_blocks import (
    ACTIVATIONS,
    LowRankLinear,
    gated_mlp_ref,
    gated_product_ref,
)
from deltadiff.ops.rms_norm import rms_norm

F32 = torch.float32
NAMES = ("weight", "lora_A", "lora_B", "gate", "bias")


@pytest.fixture
def layer(randn):
    """layer(n, k, r, dtype, device, ...): a layer whose branch is as large as its base."""

    def make(n, k, r, dtype=F32, device="cpu", adapter=None, full=False):
        how = {"device": device}
        a = randn(r, k, dtype=adapter or dtype, scale=k**-0.5, **how).requires_grad_()
        b = randn(n, r, dtype=adapter or dtype, scale=r**-0.5, **how).requires_grad_()
        gate = randn(r, **how).requires_grad_() if full else None
        bias = randn(n, dtype=dtype, **how).requires_grad_() if full else None
        w = randn(n, k, dtype=dtype, scale=k**-0.5, **how)
        return LowRankLinear(w, a, b, gate, bias, 0.7)

    return make


def leaves_of(x, layers):
    named = {"x": x}
    for i, layer in enumerate(layers):
        named |= {f"{name} {i}": getattr(layer, name) for name in NAMES[1:]}
    return {name: t for name, t in named.items() if t is not None}


def outputs(function, x, layers, dy, *args, **options):
    """y and all gradients, as a dict."""
    y = function(x, layers[:-1], layers[-1], *args, **options)
    leaves = leaves_of(x, layers)
    return {
        "y": y,
        **dict(zip(leaves, torch.autograd.grad(y, [*leaves.values()], dy), strict=True)),
    }


def double(x, layers, dy):
    wide = [
        LowRankLinear(
            *(None if t is None else t.detach().double().requires_grad_() for t in layer[:5]),
            layer.scaling,
        )
        for layer in layers
    ]
    return x.detach().double().requires_grad_(), wide, dy.double()


@pytest.mark.parametrize("joint", [False, True], ids=["two layers", "joint"])
@pytest.mark.parametrize("full", [False, True], ids=["plain", "gates and biases"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_output_and_gradients(path, dtype, joint, full, activation, layer, randn, assert_close):
    m, k, i, n, r = 37, 48, 72, 40, 16
    how = {"dtype": dtype, "device": path.device}
    adapter = F32 if full else dtype
    inner = [(2 * i, k)] if joint else [(i, k), (i, k)]
    layers = [layer(*size, r, adapter=adapter, full=full, **how) for size in (*inner, (n, i))]
    x, dy = randn(m, k, **how).requires_grad_(), randn(m, n, **how)
    ours = outputs(gated_mlp, x, layers, dy, activation, [path.backend] * 3)
    eager = outputs(gated_mlp_ref, x, layers, dy, activation)
    truth = outputs(gated_mlp_ref, *double(x, layers, dy), activation)
    gates = [name for name in truth if name.startswith("gate")]
    if gates:  # the error of a few numbers is luck
        columns = (torch.cat([each.pop(name) for name in gates]) for each in (ours, eager, truth))
        assert_close(*columns, 3, dtype)
    for name, expected in truth.items():
        assert_close(ours[name], eager[name], expected, 2 if name == "y" else 3)


def test_it_equals_the_eager_modules(layer, randn):
    """The block, written with PyTorch's own functions as transformers does."""
    x, (gate, up, down) = randn(5, 16), (layer(*s, 2) for s in ((24, 16), (24, 16), (16, 24)))

    def linear(x, q):
        return x @ (q.weight + q.scaling * q.lora_B @ q.lora_A).T

    expected = linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)
    torch.testing.assert_close(gated_mlp(x, [gate, up], down, "silu"), expected)


def test_it_keeps_x_and_two_products_alone(layer, randn):
    m, k, i = 64, 32, 96
    x = randn(2, m // 2, k).requires_grad_()
    layers = [layer(i, k, 2), layer(i, k, 2), layer(k, i, 2)]
    _, kept = kept_by(gated_mlp, x, layers[:2], layers[2], "silu")
    given = {t.data_ptr() for t in (x, *(t for q in layers for t in q[:5] if t is not None))}
    large = [t.numel() for t in kept if t.data_ptr() not in given and t.numel() > 8 * m]
    assert sorted(large) == [m * i, m * i]


@pytest.mark.parametrize("joint", [False, True])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(path, joint, layer, randn):
    how = {"device": path.device}
    x = randn(9, 16, **how).requires_grad_()
    inner = [layer(48, 16, 2, **how)] if joint else [layer(24, 16, 2, **how) for _ in range(2)]
    layers = [*inner, layer(16, 24, 2, **how)]
    y = gated_mlp(x, inner, layers[-1], "gelu", [path.backend] * 3)
    leaves = [*leaves_of(x, layers).values()]
    dy = randn(9, 16, **how)
    runs = [torch.autograd.grad(y, leaves, dy, retain_graph=keep) for keep in (True, True, False)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_only_what_is_trained_gets_a_gradient(layer, randn):
    x = randn(9, 16)
    layers = [layer(24, 16, 2), layer(24, 16, 2), layer(16, 24, 2)]
    everything = outputs(gated_mlp, x.requires_grad_(), layers, randn(9, 16), "silu")
    assert len(everything) == 8
    x = x.detach()
    for q in layers:
        q.lora_A.requires_grad_(False)
    y = gated_mlp(x, layers[:2], layers[2], "silu")
    trained = [q.lora_B for q in layers]
    found = torch.autograd.grad(y, trained, torch.ones_like(y), retain_graph=True)
    expected = torch.autograd.grad(
        gated_mlp_ref(x, layers[:2], layers[2], "silu"), trained, torch.ones_like(y)
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(BackendUnavailableError, match="second derivative"):
        torch.autograd.grad(y, trained, torch.ones_like(y), create_graph=True)


@pytest.mark.parametrize("normed", [False, True])
def test_second_derivatives_are_those_of_the_reference(normed, layer, randn, assert_close):
    layers = [layer(24, 16, 2), layer(24, 16, 2), layer(16, 24, 2)]
    x, weight = randn(9, 16).requires_grad_(), randn(16)

    def second(function, x, layers, weight):
        y = function(rms_norm(x, weight, 1e-6) if normed else x, layers[:2], layers[2], "silu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        leaves = [x, *(q.lora_A for q in layers), *(q.lora_B for q in layers)]
        return torch.autograd.grad(dx.square().sum(), leaves)

    wide_x, wide, _ = double(x, layers, x)
    truth = second(gated_mlp_ref, wide_x, wide, weight.double())
    ours, eager = (second(f, x, layers, weight) for f in (gated_mlp, gated_mlp_ref))
    for found, theirs, expected in zip(ours, eager, truth, strict=True):
        assert_close(found, theirs, expected, 3)


def test_several_gradients_at_a_time(layer, randn):
    """``is_grads_batched=True``, which no kernel takes."""
    x, layers = (
        randn(9, 16).requires_grad_(),
        [layer(24, 16, 2), layer(24, 16, 2), layer(16, 24, 2)],
    )
    y = gated_mlp(rms_norm(x, randn(16), 1e-6), layers[:2], layers[2], "silu")
    leaves, dys = [*leaves_of(x, layers).values()], randn(3, 9, 16)
    found = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for batched, alone in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(alone))


def test_autocast_computes_in_its_dtype(layer, randn):
    layers = [layer(24, 16, 2), layer(24, 16, 2), layer(16, 24, 2)]
    x = randn(3, 3, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = gated_mlp(x, layers[:2], layers[2], "silu")
    assert y.dtype == torch.bfloat16 and y.shape == (3, 3, 16)
    y.float().sum().backward()
    assert x.grad.dtype == F32 and layers[0].lora_A.grad.dtype == F32


def test_wrong_arguments(layer, randn):
    x, gate, down = randn(4, 16), layer(24, 16, 2), layer(16, 24, 2)
    with pytest.raises(ArgumentError, match="activation: got 'relu'"):
        gated_mlp(x, [gate, gate], down, "relu")
    with pytest.raises(ArgumentError, match="inner: got 3 layers"):
        gated_mlp(x, [gate] * 3, down, "silu")
    with pytest.raises(ArgumentError, match="inner: got outputs of 49 in all"):
        gated_mlp(x, [gate, layer(25, 16, 2)], down, "silu")
    with pytest.raises(ArgumentError, match="outer: got a weight of 16x24; accepted: 12 columns"):
        gated_mlp(x, [gate], down, "silu")  # a joint layer of 24 has halves of 12
    with pytest.raises(ArgumentTypeError, match="x"):
        gated_mlp(x.double(), [gate, gate], down, "silu")


# ------------------------------------------------------------------------- the product in it


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_and_special_inputs_of_the_product(path, activation, randn):
    e = torch.tensor([[-3e4, -200.0, -90.0, -1.0, -0.0, 0.0, 1.0, 90.0, 200.0, 3e4, 5.0, 0.1]])
    e = e.to(path.device)
    g, dh = torch.full_like(e, 0.5), torch.full_like(e, 2.0)
    kernels = pytest.importorskip("deltadiff.kernels.gated_product")
    forward, backward = gated_product, gated_product_bwd
    if path.backend == "triton":
        forward, backward = kernels.gated_product, kernels.gated_product_bwd
    leaves = [t.double().requires_grad_() for t in (e, g)]
    expected = gated_product_ref(*leaves, activation)
    torch.testing.assert_close(forward(e, g, activation).double(), expected.detach())
    de, dg = torch.empty_like(e), torch.empty_like(e)
    backward(e, g, dh, activation, de, dg)
    for found, gradient in zip(
        (de, dg), torch.autograd.grad(expected, leaves, dh.double()), strict=True
    ):
        torch.testing.assert_close(found.double(), gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1), (70, 136, 16), (130, 200, 33), (64, 128, 64)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_pass_that_makes_dA_too(
    path, dtype, shape, activation, randn, assert_close, monkeypatch
):
    kernels = pytest.importorskip("deltadiff.kernels.gated_product")
    if path.backend != "triton":
        pytest.skip("a kernel of Triton")
    monkeypatch.setattr(kernels, "ROWS_PER_SPLIT", 64)
    (m, n, r), how = shape, {"dtype": dtype, "device": path.device}
    pitch = -(-r // 8) * 8
    e, g, dh, v = randn(m, 2 * n, **how), randn(m, n, **how), randn(m, n, **how), None
    e, v = e[:, :n], randn(m, pitch, **how)  # rows of e lie apart, as those of a joint layer do
    alone = torch.empty_like(g), torch.empty_like(g)
    kernels.gated_product_bwd(e, g, dh, activation, *alone)
    de, dg = dh.clone(), torch.empty_like(g)
    da = kernels.gated_product_bwd_and_da(e, g, de, v, r, activation, de, dg)
    tolerances = {"atol": 0, "rtol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close((de, dg), alone, **tolerances)
    h = gated_product_ref(e, g, activation)
    truth = v[:, :r].double().T @ gated_product_ref(e.double(), g.double(), activation)
    assert_close(da, v[:, :r].float().T @ h.float(), truth, 3, dtype)
    again = kernels.gated_product_bwd_and_da(e, g, dh, v, r, activation, *alone)
    assert torch.equal(da, again)
