"""Calls of `lora_linear`: random inputs, and what comes out of a forward and a backward pass."""

import torch

from deltadiff import lora_linear

F32 = torch.float32


def inputs(randn, m, k, n, r, dtype, device, adapter=None, gate=None, bias=False):
    """(x, weight, lora_A, lora_B, gate, bias, dy) with a low-rank branch as large as the base."""
    adapter = adapter or dtype
    return [
        randn(m, k, dtype=dtype, device=device),
        randn(n, k, dtype=dtype, device=device, scale=k**-0.5),
        randn(r, k, dtype=adapter, device=device, scale=k**-0.5),
        randn(n, r, dtype=adapter, device=device, scale=r**-0.5),
        None if gate is None else randn(*gate, dtype=F32, device=device),
        randn(n, dtype=dtype, device=device) if bias else None,
        randn(m, n, dtype=dtype, device=device),
    ]


def outputs(function, x, weight, a, b, gate, bias, dy, scaling=0.7, **kwargs):
    """y and the gradients of all that has one, as a dict."""
    leaves = {"x": x, "lora_A": a, "lora_B": b, "gate": gate, "bias": bias}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items() if t is not None}
    y = function(
        leaves["x"], weight, leaves["lora_A"], leaves["lora_B"], scaling=scaling,
        gate=leaves.get("gate"), bias=leaves.get("bias"), **kwargs,
    )  # fmt: skip
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def kept_by(function, *args, **options):
    """What it gives, and the tensors that autograd keeps of it for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        return function(*args, **options), kept


def assert_frozen_A_keeps_no_x(given, trained, **options):
    """Those of ``trained`` get the gradients that they get beside a trained A."""
    everything = outputs(lora_linear, *given, **options)
    x, w, a, b, gate, bias, dy = given
    leaves = {"x": x, "lora_B": b, "gate": gate, "bias": bias}
    for name in trained:
        leaves[name].requires_grad_()
    y, kept = kept_by(lora_linear, x, w, a, b, scaling=0.7, gate=gate, bias=bias, **options)
    assert kept and all(t.data_ptr() != x.data_ptr() for t in kept)
    y.backward(dy)
    for name in trained:
        assert torch.equal(leaves[name].grad, everything[name]), name


def doubles(tensors):
    return [None if t is None else t.double() for t in tensors]
