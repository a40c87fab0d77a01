"""The factored update under torch.func: derivatives as in Algorithm 1, in which W is a constant."""

import pytest
import torch
from delta_lora_runs import W_UPDATES, batch, make_model, train
from torch import func

from deltadiff import DeltaLoRA
from deltadiff.errors import SwapError


def trained(w_update):
    model = make_model(torch.float64)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update), 4)
    pairs = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}
    x = batch(0, model)[0]
    return pairs, lambda pairs: func.functional_call(model, pairs, (x,))


def backward(f, pairs, dy, twice=True):
    leaves = {n: p.clone().requires_grad_() for n, p in pairs.items()}
    return torch.autograd.grad(f(leaves), list(leaves.values()), dy, create_graph=twice), leaves


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_transforms_agree_with_the_backward_pass(w_update):
    pairs, f = trained(w_update)
    y, pull = func.vjp(f, pairs)
    torch.testing.assert_close(y, f(pairs), rtol=1e-14, atol=1e-14)
    torch.manual_seed(0)
    dy, tangents = torch.randn_like(y), {n: torch.randn_like(p) for n, p in pairs.items()}
    grads, leaves = backward(f, pairs, dy, twice=w_update == "inplace")
    for by_func, by_autograd in zip(pull(dy)[0].values(), grads, strict=True):
        torch.testing.assert_close(by_func, by_autograd.detach())
    forward = (func.jvp(f, (pairs,), (tangents,))[1] * dy).sum()
    reverse = sum((g * t).sum() for g, t in zip(grads, tangents.values(), strict=True))
    torch.testing.assert_close(forward, reverse.detach())
    # The second derivatives, in the direction of the tangents.
    over = func.jvp(lambda p: list(func.vjp(f, p)[1](dy)[0].values()), (pairs,), (tangents,))[1]
    step = 1e-5
    ahead, behind = (
        func.vjp(f, {n: p + sign * step * tangents[n] for n, p in pairs.items()})[1](dy)[0]
        for sign in (1, -1)
    )
    for found, one, other in zip(over, ahead.values(), behind.values(), strict=True):
        torch.testing.assert_close(found, (one - other) / (2 * step), rtol=1e-6, atol=1e-6)
    if w_update == "factored":
        return
    twice = torch.autograd.grad(reverse, list(leaves.values()))
    for found, wanted in zip(over, twice, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_second_derivative_by_autograd_is_refused_where_it_would_be_wrong():
    pairs, f = trained("factored")
    with pytest.raises(SwapError, match="create_graph: got a backward pass.*accepted: torch.func"):
        backward(f, pairs, torch.ones_like(f(pairs)))
