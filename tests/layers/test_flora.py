"""FLoRA: its start, its product, where it runs, and what becomes of a trained model."""

import copy
import math

import pytest
import torch
from adalora_runs import SCHEDULE, base, data, loss_of
from adalora_runs import swapped as with_lambda
from flora_runs import swapped
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from deltadiff import (
    DeltaLoRA,
    FusedAdamW,
    load_adapter,
    lora_linear,
    merge_,
    save_adapter,
    swap_,
    unswap_,
)
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.flora import swap_flora_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA, truncate_


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


# ----------------------------------------------------------------------------- the start


def test_the_start_is_the_base_model_and_the_authors_draw():
    model = base()
    x, _ = data(0)
    before = model(x)
    report = swap_flora_(model, r=4, target_modules=["0", "2"], seed=0)
    assert torch.equal(model(x), before) and {row.r for row in report.rows} == {4}
    assert report.trainable == 4 * (12 + 20 + 4) + 4 * (20 + 20 + 4)
    layer = model[0]
    assert layer.gate.requires_grad and layer.scaling == 1 and not layer.gate.any()
    generator = torch.Generator().manual_seed(0)
    for p in (layer.lora_A, layer.lora_B):  # the authors keep A and B as (in, r) and (out, r)
        theirs = torch.empty(p.numel() // 4, 4)
        nn.init.kaiming_normal_(theirs, a=math.sqrt(3), generator=generator)
        torch.testing.assert_close(p.flatten().float(), theirs.flatten(), atol=0, rtol=1e-6)
    unswap_(model)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("swap", [swap_flora_, swap_adalora_])
def test_the_report_tells_which_layers_are_too_small(swap):
    report = swap(base(), **{"r" if swap is swap_flora_ else "init_r": 8})
    assert [row.module for row in report.rows] == ["0", "2"]
    assert "1 layers are smaller than r = 8 and got no pair: 4" in str(report)


def test_the_scale_is_alpha_over_r():
    assert swapped(lora_alpha=6)[0].scaling == 1.5


# --------------------------------------------------------------------------- the product


@pytest.mark.parametrize("sizes", [(48, 32), (32, 48)], ids=["into A", "into B"])
def test_layer_on_every_path(path, dtype, sizes, randn, assert_close):
    """(W + s B G A) x and its gradients, on each backend."""
    (n, k), m, r = sizes, 24, 5
    layer = nn.Sequential(nn.Linear(k, n))
    with torch.no_grad():
        layer[0].weight.copy_(randn(n, k, scale=0.1))
        layer[0].bias.copy_(randn(n))
    layer.to(path.device, dtype)
    swap_flora_(layer, r=r, lora_alpha=10, backend=path.backend, adapter_dtype=dtype)
    (layer,) = lora_layers(layer).values()
    with torch.no_grad():
        for p in layer.adapter:
            p.copy_(randn(*p.shape))
    x = randn(m, k, dtype=dtype, device=path.device).requires_grad_()
    dy = randn(m, n, dtype=dtype, device=path.device)

    def formula(x, w, bias, b, g, a):
        return x @ w.T + bias + 2.0 * (((x @ a.T) @ g.T) @ b.T)

    leaves = [x, layer.weight, layer.bias, layer.lora_B, layer.gate, layer.lora_A]
    truth = [t.detach().double().requires_grad_() for t in leaves]
    eager = [t.detach().clone().requires_grad_() for t in leaves]
    results = []
    for y, ts in ((layer(x), leaves), (formula(*eager), eager), (formula(*truth), truth)):
        y.backward(dy.to(y.dtype))
        results.append([y, *(ts[i].grad for i in (0, 3, 4, 5))])
    for i, (found, other, exact) in enumerate(zip(*results, strict=True)):
        assert_close(found, other, exact.detach(), 2 if i == 0 else 3)


def summed(model, x):
    """The model with W + s B G A in the place of W."""
    layers = list(lora_layers(model).values())
    for i, m in enumerate(layers):
        w = m.weight + m.scaling * m.lora_B @ m.gate @ m.lora_A
        x = linear(x, w, m.bias)
        x = x if i + 1 == len(layers) else x.tanh()
    return x


def test_it_is_the_sum_of_weight_and_product_in_float64():
    model = swapped(lora_alpha=6)
    params = [p for m in lora_layers(model).values() for p in m.adapter]
    x = data(0)[0].requires_grad_()
    y, truth = model(x), summed(model, x)
    torch.testing.assert_close(y, truth, atol=1e-13, rtol=1e-12)
    of_ours = torch.autograd.grad(y.square().sum(), [x, *params])
    of_truth = torch.autograd.grad(truth.square().sum(), [x, *params])
    for ours, theirs in zip(of_ours, of_truth, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-11)
    assert (base()(x) - truth).abs().max() > 0.1


class Shapes(TorchDispatchMode):
    """What the operations in this context gave."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("sizes", [(30, 20), (20, 30)], ids=str)
def test_nothing_has_the_size_of_the_weight(sizes):
    n, k = sizes
    model = nn.Sequential(nn.Linear(k, n))
    swap_flora_(model, r=4)
    x = torch.randn(7, k)
    with Shapes() as shapes:
        model(x).sum().backward()
    assert (4, 4) in shapes.seen and (n, k) not in shapes.seen | {s[::-1] for s in shapes.seen}


def test_a_core_of_rank_1_is_a_number():
    model = swapped(r=1)
    x, _ = data(0)
    torch.testing.assert_close(model(x), summed(model, x), atol=1e-13, rtol=1e-12)
    assert model[0].gate.shape == (1, 1)
    expected = model(x).detach()
    merge_(model)
    torch.testing.assert_close(model(x), expected, atol=1e-13, rtol=1e-12)


# ------------------------------------------------------------------------- where it runs


def test_autocast_rounds_the_factor_once():
    """The product of the core is made in float32, as the factors are kept."""
    model = swapped(torch.float32)
    layer, x = model[0], data(0, torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        with torch.autocast("cpu", enabled=False):
            a = layer.gate @ layer.lora_A
        expected = lora_linear(
            x, layer.weight, a, layer.lora_B, scaling=layer.scaling, bias=layer.bias
        )
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert layer.gate.grad.dtype == torch.float32


def gradients(model, run):
    model.zero_grad()
    run(model).square().mean().backward()
    return [p.grad.clone() for m in lora_layers(model).values() for p in m.adapter]


def test_compiled_and_checkpointed_as_eager():
    model, x = swapped(torch.float32), data(0, torch.float32)[0]
    expected = gradients(model, lambda model: model(x))
    again = gradients(model, lambda model: checkpoint(model, x, use_reentrant=False))
    assert all(map(torch.equal, again, expected))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(gradients(model, lambda _: compiled(x)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(512, 256), (256, 512)], ids=["into A", "into B"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_of_the_fast_kernels_and_a_captured_pass(sizes, dtype, assert_close):
    torch.manual_seed(0)
    (n, k), tokens = sizes, 384
    model = nn.Sequential(nn.Linear(k, n)).to("cuda", dtype)
    swap_flora_(model, r=16)
    nn.init.normal_(model[0].gate)
    x = torch.randn(tokens, k, device="cuda", dtype=dtype)
    dy = torch.randn(tokens, n, device="cuda", dtype=dtype)

    def eager(model, x):
        m = model[0]
        return linear(x, m.weight, m.bias) + linear(x, (m.lora_B @ m.gate @ m.lora_A).to(x.dtype))

    def results(run, model, x):
        model.zero_grad()
        y = run(model, x)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(p.grad.clone() for p in model[0].adapter)]

    found, other = results(lambda model, x: model(x), model, x), results(eager, model, x)
    exact = results(eager, copy.deepcopy(model).double(), x.double())
    for i, (ours, theirs, truth) in enumerate(zip(found, other, exact, strict=True)):
        assert_close(ours, theirs, truth, 2 if i == 0 else 3)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(x)
        with torch.cuda.graph(graph):
            y = model(x)
        model[0].gate.mul_(2)
        graph.replay()
        assert torch.equal(y, model(x))


# ------------------------------------------------------------- what becomes of the model


def test_adapter_merge_and_state_hold_the_core(tmp_path):
    model = swapped(lora_alpha=6)
    train(model, FusedAdamW(model, lr=0.05), range(8))
    x, _ = data(50)
    wanted = model(x).detach()
    save_adapter(model, tmp_path)
    fresh, plain = base(), base()
    load_adapter(fresh, tmp_path)
    assert isinstance(fresh[0].gate, nn.Parameter)
    swap_(plain, r=4, lora_alpha=6)
    plain.load_state_dict(model.state_dict())
    for other in (fresh, plain, copy.deepcopy(model)):
        torch.testing.assert_close(other(x), wanted, atol=1e-12, rtol=0)
    merge_(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)
    assert not torch.allclose(base()(x), wanted, atol=1e-3)


def test_a_run_resumes_bit_by_bit(tmp_path):
    model = swapped()
    optimizer = FusedAdamW(model, lr=0.02)
    train(model, optimizer, range(4))
    save_adapter(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = base()
    load_adapter(fresh, tmp_path)
    second = FusedAdamW(fresh, lr=0.5)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, range(4, 9))
    train(fresh, second, range(4, 9))
    found = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, fresh)]
    assert len(found[0]) == 9 and found[0].keys() == found[1].keys()
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


@pytest.mark.parametrize("make", [swapped, with_lambda])
def test_a_trained_gate_gets_the_dtype_of_the_pair(make, tmp_path):
    """An adapter of 16 bits that is trained on beside a pair of float32."""
    save_adapter(make(torch.bfloat16, adapter_dtype=torch.bfloat16), tmp_path)
    fresh = base(torch.bfloat16)
    load_adapter(fresh, tmp_path)
    assert {p.dtype for m in lora_layers(fresh).values() for p in m.adapter} == {torch.float32}
    assert fresh[0].gate.requires_grad


def test_a_second_swap_keeps_the_cores_trainable():
    model = base()
    swap_flora_(model, r=4, target_modules=["0"])
    swap_(model, r=2, target_modules=["2"])
    assert model[0].gate.requires_grad and model[2].gate is None
    swap_flora_(model, r=3, target_modules=["4"])
    assert [model[i].adapter[-1].shape for i in (0, 2, 4)] == [(4, 4), (20, 2), (3, 3)]


# ------------------------------------------------------------------------- what is refused


def test_methods_that_are_not_for_a_core():
    model = swapped()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="0 with FLoRA's core.*or update_ratio=0"):
        DeltaLoRA(model, update_ratio=0.5)
    with pytest.raises(ArgumentError, match="0 with a gate of another method"):
        DyLoRA(model)
    with pytest.raises(ArgumentError, match="no layer with a Lambda"):
        AdaLoRA(model, **SCHEDULE)
    with pytest.raises(SwapError, match="a layer of AdaLoRA or FLoRA"):
        truncate_(model, 2)
    plain = base()
    swap_(plain, r=4)
    plain.load_state_dict(before)  # with a core that is not trained
    with pytest.raises(SwapError, match="a layer of AdaLoRA or FLoRA"):
        truncate_(plain, 2)
    for other in (model, plain):
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    train(model, DeltaLoRA(model, lr=0.02, update_ratio=0), range(2))
    assert not torch.equal(model[0].gate, before["0.gate"])


def test_adapters_of_another_kind_of_gate(tmp_path):
    plain = base()
    swap_(plain, r=4)
    for name, other in {"none": plain, "Lambda": with_lambda()}.items():
        save_adapter(other, tmp_path / name)
        with pytest.raises(SwapError, match="gate"):
            load_adapter(swapped(), tmp_path / name)


BAD = {
    "model": (lambda: swap_flora_([]), ArgumentTypeError, "model: got list"),
    "r": (lambda: swap_flora_(base(), r=2.0), ArgumentTypeError, "r: got"),
    "r 0": (lambda: swap_flora_(base(), r=0), ArgumentError, "r: got 0"),
    "r large": (
        lambda: swap_flora_(base(), r=13, target_modules=["0"]),
        ArgumentError,
        "r: got 13",
    ),
    "lora_alpha": (lambda: swap_flora_(base(), lora_alpha=0), ArgumentError, "lora_alpha"),
    "lora_dropout": (lambda: swap_flora_(base(), lora_dropout=1), ArgumentError, "lora_dropout"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call()


def test_models_of_peft():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ArgumentTypeError, match="PEFT's layers, which FLoRA cannot train"):
        swap_flora_(wrapped)
    assert not lora_layers(wrapped)
