"""Derivatives of `lora_linear` beyond one backward pass: right, or refused in words."""

import pytest
import torch
from lora_linear_calls import doubles, inputs
from torch import func
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from deltadiff import adamw_step_, delta_update_, lora_linear
from deltadiff.errors import ArgumentError, BackendUnavailableError
from deltadiff.ops.reference import lora_linear_ref

F32 = torch.float32
DRAWS = 6  # of the inputs, for the error of a derivative of three numbers is luck

# PyTorch's own warnings of what `torch.func.linearize` does.
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*get_attr Node")

OPTIONS = {
    "plain": {},
    "gate, bias": {"gate": (3,), "bias": True},
    "scalar gate": {"gate": ()},
    "dropout": {"gate": (3,), "dropout": 0.3},
}
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def tangents(leaves):
    generator = torch.Generator().manual_seed(3)
    drawn = (torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves)
    return tuple(u.to(t) for u, t in zip(drawn, leaves, strict=True))


def forward_mode(f, leaves):
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, leaves, tangents(leaves))
        return forward_ad.unpack_dual(f(*duals)).tangent.clone()


def places(leaves):
    return tuple(range(len(leaves)))


def loss(f):
    return lambda *leaves: f(*leaves).pow(3).sum()


def gradients_by_sample(f, leaves):
    x, *rest = leaves
    grads = func.grad(loss(f), argnums=places(leaves))
    return func.vmap(grads, in_dims=(0, *[None] * len(rest)))(x[:, None], *rest)


TRANSFORMS = {
    "forward mode": forward_mode,
    "jvp": lambda f, leaves: func.jvp(f, leaves, tangents(leaves)),
    "jvp of A alone": lambda f, ts: func.jvp(lambda a: f(ts[0], a, *ts[2:]), ts[1:2], ts[1:2]),
    "vjp": lambda f, leaves: func.vjp(f, *leaves)[1](f(*leaves)),
    "linearize": lambda f, leaves: func.linearize(f, *leaves)[1](*tangents(leaves)),
    "jacfwd": lambda f, leaves: func.jacfwd(f, argnums=places(leaves))(*leaves),
    "jacrev": lambda f, leaves: func.jacrev(f, argnums=places(leaves))(*leaves),
    "hessian": lambda f, leaves: func.hessian(loss(f), argnums=places(leaves))(*leaves),
    "vmap": lambda f, leaves: func.vmap(lambda x: f(x, *leaves[1:]))(leaves[0][:, None]),
    "gradients by sample": gradients_by_sample,
}


def with_grad(leaves):
    return [t.clone().requires_grad_() for t in leaves]


def double_backward(f, leaves):
    leaves = with_grad(leaves)
    grads = torch.autograd.grad(loss(f)(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    return [*(g.detach() for g in grads), *second]


def hessian_of_x(f, leaves):
    alone = loss(lambda x: f(x, *leaves[1:]))
    return torch.autograd.functional.hessian(alone, leaves[0], strict=True)


def batched_gradients(f, leaves):
    leaves = with_grad(leaves)
    y = f(*leaves)
    dys = torch.stack([y.detach(), tangents([y])[0]])
    return torch.autograd.grad(y, leaves, dys, is_grads_batched=True)


AFTER_THE_CALL = {
    "double backward": double_backward,
    "hessian of x": hessian_of_x,
    "batched gradients": batched_gradients,
}


def compare(transform, randn, assert_close, device, options, backend):
    """Ours in float32 against the reference in float64."""
    options = dict(options)
    rest = {"dropout": options.pop("dropout", 0.0), "seed": 5, "scaling": 0.7}
    draws = []
    for _ in range(DRAWS):
        given = inputs(randn, 4, 6, 5, 3, F32, device, **options)
        calls = (
            as_function(lora_linear, given, backend=backend, **rest),
            as_function(lora_linear_ref, given, **rest),
            as_function(lora_linear_ref, doubles(given), **rest),
        )
        draws.append([tree_leaves(transform(*call)) for call in calls])
    for leaves in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        mine, theirs, exact = map(torch.stack, zip(*leaves, strict=True))
        if exact.any():
            assert_close(mine, theirs, exact, 3)
        else:
            assert not mine.any()


def as_function(op, given, **rest):
    """(f, leaves), with f a function of all that has a derivative."""
    x, w, a, b, gate, bias, _ = given
    names = [name for name, t in (("gate", gate), ("bias", bias)) if t is not None]
    leaves = (x, a, b, *(t for t in (gate, bias) if t is not None))

    def f(x, a, b, *others):
        return op(x, w, a, b, **dict(zip(names, others, strict=True)), **rest)

    return f, leaves


@options
@pytest.mark.parametrize("name", TRANSFORMS)
@devices
def test_transforms_are_those_of_the_reference(name, options, device, randn, assert_close):
    compare(TRANSFORMS[name], randn, assert_close, device, options, None)


@options
@pytest.mark.parametrize("name", AFTER_THE_CALL)
def test_second_derivatives_of_every_backend(name, options, path, randn, assert_close):
    compare(AFTER_THE_CALL[name], randn, assert_close, path.device, options, path.backend)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_backend_that_was_asked_for_is_refused_under_a_transform(name, path, randn):
    f, leaves = as_function(
        lora_linear, inputs(randn, 4, 6, 5, 3, F32, path.device), scaling=1.0, backend=path.backend
    )
    if path.backend == "reference":
        TRANSFORMS[name](f, leaves)
        return
    if name == "vjp":  # it asks for the value too, outside of a transform
        f(*leaves)
    with pytest.raises(BackendUnavailableError, match=f"'{path.backend}' under a transform"):
        TRANSFORMS[name](f, leaves)


@devices
@pytest.mark.parametrize("name", ["jvp", "jacrev", "forward mode"])
def test_transforms_under_autocast(name, device, randn):
    given = inputs(randn, 4, 6, 5, 3, F32, device, bias=True)
    with torch.autocast(device, torch.bfloat16):
        found, wanted = (
            tree_leaves(TRANSFORMS[name](*as_function(op, given, scaling=0.7)))
            for op in (lora_linear, lora_linear_ref)
        )
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - theirs).norm() <= 2.0**-6 * theirs.norm()


def test_double_backward_under_autocast(path, randn):
    """The backward pass computes in the dtypes of the forward pass, whatever autocast says then."""
    if path.backend == "reference":
        pytest.skip("there PyTorch's own backward passes follow autocast")
    given = inputs(randn, 4, 6, 5, 3, F32, path.device)
    f, leaves = as_function(lora_linear, given, scaling=0.7, backend=path.backend)
    leaves = with_grad(leaves)
    y = f(*leaves)
    wanted = torch.autograd.grad(y, leaves, y.detach(), retain_graph=True)
    with torch.autocast(path.device.type, torch.bfloat16):
        found = torch.autograd.grad(y, leaves, y.detach(), create_graph=True)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == F32 and (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_second_derivatives_without_x_are_refused(path, randn):
    """A frozen A keeps no x, which the gradient of B is made of."""
    x, w, a, b, *_ = inputs(randn, 4, 6, 5, 3, F32, path.device)
    x, b = with_grad([x, b])
    y = lora_linear(x, w, a, b, scaling=1.0, backend=path.backend)
    if path.backend == "reference":
        torch.autograd.grad(y.sum(), [x, b], create_graph=True)
        return
    with pytest.raises(BackendUnavailableError, match="lora_A is frozen.*backend='reference'"):
        torch.autograd.grad(y.sum(), [x, b], create_graph=True)


def test_second_derivatives_of_x_alone_need_no_x(path, randn):
    x, w, a, b, *_ = inputs(randn, 4, 6, 5, 3, F32, path.device)
    found = []
    for op, options in ((lora_linear, {"backend": path.backend}), (lora_linear_ref, {})):
        (leaf,) = with_grad([x])
        y = op(leaf, w, a, b, scaling=1.0, **options)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), leaf)[0])
    assert (found[0] - found[1]).norm() <= 1e-5 * found[1].norm()


def test_the_bias_alone(path, randn):
    x, w, a, b, _, bias, dy = inputs(randn, 4, 6, 5, 3, F32, path.device, bias=True)
    (bias,) = with_grad([bias])
    y = lora_linear(x, w, a, b, scaling=1.0, bias=bias, backend=path.backend)
    (grad,) = torch.autograd.grad(y, bias, dy, create_graph=True)
    assert (grad - dy.sum(0)).norm() <= 1e-6 * grad.norm()


def test_operations_in_place_are_refused_under_a_transform(path):
    w, a, b = torch.ones(4, 6), torch.ones(2, 6), torch.ones(4, 2)
    w, a, b = (t.to(path.device) for t in (w, a, b))

    def update(scale):
        delta_update_(w, a, b, a, b, scale=1.0, backend=path.backend)
        return scale

    def step(scale):
        adamw_step_([w], [w], [w.clone()], [w.clone()], w[0, :1].clone(), lr=1.0)
        return scale

    one = torch.ones(3)
    for f, argument in ((update, "delta_update_"), (step, "adamw_step_")):
        for call in (lambda f: func.vmap(f)(one), lambda f: func.jvp(f, (one,), (one,))):
            with pytest.raises(ArgumentError) as raised:
                call(f)
            assert raised.value.argument == argument
    assert (w == 1).all()
