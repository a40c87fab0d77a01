"""Which calls are one call of `lora_linear`, and which run PEFT's own forward, with the reason.

Whatever runs a call, the results are those of PEFT's layer.
"""

import pytest
import torch
from peft_cases import lora
from peft_checks import fused_calls, layers_named, run, swap_quietly
from peft_models import input_of, output_of
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from deltadiff import swap_report

X = input_of("mlp")


def pair(**options):
    """The same model twice, as PEFT runs it and swapped, in float64."""
    plain, swapped = (lora(**options).build() for _ in range(2))
    swap_quietly(swapped)
    return plain, swapped


def layer_of(model):
    return model.base_model.model.lin0


def compare(models, call, fused, reason=None):
    """Both models give the same to 1e-12, the swapped one with so many fused calls."""
    plain, swapped = models
    wanted = call(plain)
    with fused_calls(swapped) as calls:
        found = call(swapped)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert calls.total() == fused
    if reason is not None:
        assert reason in str(swap_report(swapped))


# --------------------------------------------------------- what a layer or its state decides


def _disabled(model):
    model.base_model.disable_adapter_layers()


def _merged(model):
    model.merge_adapter()


def _hook(where):
    def put(model):
        module = where(layer_of(model))
        module.register_forward_hook(lambda m, args, y: 2 * y)

    return put


def _own_forward(model):
    base = layer_of(model).base_layer
    base.forward = lambda x, forward=base.forward: 2 * forward(x)


class _Double(nn.Module):
    def forward(self, w):
        return 2 * w


def _parametrised(model):
    parametrize.register_parametrization(layer_of(model).lora_A["default"], "weight", _Double())


def _pruned(model):
    prune.l1_unstructured(layer_of(model).base_layer, "weight", amount=2)


def _subclass(model):
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    layer_of(model).base_layer.__class__ = Tripled


def _other_dropout(model):
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.0)


STATES = {
    "disabled": (_disabled, 0, "its adapters are disabled"),
    "merged": (_merged, 0, "its adapters are merged"),
    "trained base": (
        lambda m: layer_of(m).base_layer.weight.requires_grad_(), 1, "its base weight is trained",
    ),
    "hook on the base": (_hook(lambda m: m.base_layer), 1, "hooks on the modules inside of it"),
    "hook on A": (_hook(lambda m: m.lora_A["default"]), 1, "hooks on the modules inside of it"),
    "hook on B": (_hook(lambda m: m.lora_B["default"]), 1, "hooks on the modules inside of it"),
    "hook on the dropout": (
        _hook(lambda m: m.lora_dropout["default"]), 1, "hooks on the modules inside of it",
    ),
    "hook on the layer": (_hook(lambda m: m), 2, None),
    "forward of the base": (_own_forward, 1, "hooks on the modules inside of it"),
    "parametrised A": (_parametrised, 1, "lora_A and lora_B are ParametrizedLinear and Linear"),
    "pruned base": (_pruned, 1, "hooks on the modules inside of it"),
    "subclass of nn.Linear": (_subclass, 1, "its base layer is Tripled"),
    "another dropout": (_other_dropout, 1, "its dropout is AlphaDropout"),
    "A in float32": (
        lambda m: layer_of(m).lora_A["default"].float(), 1, "its adapters are torch.float32",
    ),
    "frozen A": (lambda m: layer_of(m).lora_A["default"].weight.requires_grad_(False), 2, None),
    "no cast, the dtypes agree": (
        lambda m: setattr(layer_of(m), "cast_input_dtype_enabled", False), 2, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("called_before", [False, True], ids=["", "after a fast call"])
@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_layer(name, called_before):
    change, fused, reason = STATES[name]
    models = pair(target_modules=["lin0", "lin1"])
    if called_before:
        compare(models, lambda m: output_of(m, X), 2)
    for model in models:
        change(model)
    try:
        wanted = output_of(models[0], X)
    except RuntimeError as error:  # PEFT does not run at all
        with pytest.raises(RuntimeError) as found:
            output_of(models[1], X)
        assert str(found.value) == str(error)
    else:
        assert wanted.dtype == torch.float64
        compare(models, lambda m: run(m, X, output_of), fused, reason)
    paths = layers_named(models[1], swap_report(models[1]))
    assert sum(path != "peft" for path in paths.values()) == fused


def test_hooks_that_are_taken_off_again():
    models = pair()
    for model in models:
        model.handle = layer_of(model).base_layer.register_forward_hook(lambda m, args, y: 2 * y)
    compare(models, lambda m: run(m, X, output_of), 1)
    for model in models:
        model.handle.remove()
    compare(models, lambda m: run(m, X, output_of), 2)


# ------------------------------------------------------------------------ what a call decides


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_inputs_of_all_shapes_are_fast(shape):
    x = torch.randn(shape, dtype=torch.float64)
    models = [layer_of(m) for m in pair()]
    compare(models, lambda m: m(x), 1)
    compare(models, lambda m: m(x=x), 1)
    wide = torch.randn(8, *shape, dtype=torch.float64).movedim(0, -1)[..., 0, :]
    compare(models, lambda m: m(wide), 1)


def test_gradients_to_the_input():
    x = X.clone().requires_grad_()
    compare(pair(), lambda m: torch.autograd.grad(output_of(m, x).square().sum(), x)[0], 2)


def test_adapters_by_sample_run_pefts_forward():
    names = ["default", "__base__", "default"]
    models = [m.eval() for m in pair()]
    compare(models, lambda m: m(X, adapter_names=names), 0)


def test_modes_without_gradients_are_fast():
    with torch.no_grad():
        compare(pair(), lambda m: output_of(m, X), 2)
    with torch.inference_mode():
        compare(pair(), lambda m: output_of(m, X), 2)


def _jvp(model, x):
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]


def _dual(model, x):
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(y).tangent.clone()


def _per_sample(model, x):
    pairs = {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}

    def loss(pairs, row):
        return torch.func.functional_call(model, pairs, (row[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(pairs, x)


TRANSFORMS = {
    "jvp": _jvp,
    "forward mode": _dual,
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "gradients by sample": _per_sample,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_and_forward_mode_run_pefts_forward(name):
    plain, swapped = (m.float() for m in pair())  # in float64, the reference can all of this
    call, x = TRANSFORMS[name], X.float()
    swapped(x)  # so that the layers know a fast way
    wanted = call(plain, x)
    with fused_calls(swapped) as calls:
        found = call(swapped, x)
        assert calls.total() == 0
        swapped(x)
        assert calls.total() == 2
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_global_hooks_see_pefts_modules():
    models, seen = pair(), []
    handle = register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        compare(models, lambda m: run(m, X, output_of), 0)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 2 * 2 * 3
    compare(models, lambda m: run(m, X, output_of), 2)


def test_functional_call_uses_the_tensors_that_it_is_given():
    given = {n: 2 * p.detach() for n, p in pair()[0].named_parameters() if "lora_" in n}
    models = pair()
    compare(models, lambda m: torch.func.functional_call(m, given, (X,)), 2)
    compare(models, lambda m: output_of(m, X), 2)
