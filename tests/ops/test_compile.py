"""torch.compile over swapped models: one graph, compiled once, with the results of eager mode."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

import deltadiff
from deltadiff import DeltaLoRA, lora_linear, swap_
from deltadiff.layers.lora_layers import lora_layers

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
R = 3


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def recompiling_fails():
    def forbid():
        torch.compiler.set_stance("fail_on_recompile")

    yield forbid
    torch.compiler.set_stance("default")


def make_model(device, dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 16, bias=False)
    )
    model = model.to(device, dtype)
    swap_(model, r=R, seed=0)
    for layer in (model[0], model[2]):
        torch.nn.init.normal_(layer.lora_B)
    return model


def batches(device, dtype=torch.float32):
    """Of changing batch size and sequence length, marked so that no size is baked in."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((5, 9, 24), (6, 9, 24), (6, 13, 24), (17, 20, 24), (40, 7, 24)):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        yield x


def train(device, method, compile, forbid_recompiling):
    """Losses of a few steps with a change of lr after each and, in place, of lambda."""

    def loss_of(model, x):
        return model(x).square().mean()

    def step(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    model = make_model(device)
    optimizer = DeltaLoRA(
        model, lr=1e-2, start_step=1, update_ratio=0.0 if method == "lora" else 0.5,
        w_update="factored" if method == "factored" else "inplace",
    )  # fmt: skip
    if method == "factored":  # its first step gives the forward pass another product to compute
        step(loss_of(model, next(batches(device))))
    forward = compile(loss_of)
    losses = []
    for i, x in enumerate(batches(device)):
        losses.append(step(forward(model, x)))
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
            if method == "inplace" and i > 1:
                group["update_ratio"] *= 0.8
        if forward is not loss_of:
            forbid_recompiling()
    return torch.stack(losses)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["lora", "inplace", "factored"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_training_compiles_once(device, method, dynamic, recompiling_fails):
    compile = partial(torch.compile, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    eager = train(device, method, lambda function: function, recompiling_fails)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train(device, method, compile, recompiling_fails)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch.testing.assert_close(compiled, eager)


def losses_of_a_pair_that_others_write(device, compile):
    """Of steps, before and after something else writes the pairs, with a factored update."""
    model, losses = make_model(device), []
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    forward = compile(lambda model, x: model(x).square().mean())
    for i, x in enumerate(batches(device)):
        for _ in range(2):
            losses.append(forward(model, x).detach())
            if i % 2:
                with torch.no_grad():
                    for layer in lora_layers(model).values():
                        layer.lora_B.mul_(0.7)
                        layer.lora_A.add_(0.1)
        forward(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_model_sees_that_others_wrote_a_pair(device):
    """W keeps the update that the steps made, in the forward pass and in the steps that follow."""
    eager = losses_of_a_pair_that_others_write(device, lambda function: function)
    compile = partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses_of_a_pair_that_others_write(device, compile), eager)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("gates", [(), (R,)], ids=["scalar", "vector"])
def test_a_gate_compiles_with_its_gradient(device, autocast, gates, randn, recompiling_fails):
    weight, a, b = (randn(*s, device=device) for s in ((16, 24), (R, 24), (16, R)))
    gate = randn(*gates, device=device)
    leaves = [t.requires_grad_() for t in (a, b, gate)]

    def layer(x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            return lora_linear(x, weight, a, b, scaling=0.5, gate=gate)

    compiled = torch.compile(layer, fullgraph=True)  # through Inductor: strides count there
    for x in batches(device):
        dy = randn(*x.shape[:-1], 16, device=device)
        found, expected = (
            torch.autograd.grad(f(x), leaves, dy.to(f(x).dtype)) for f in (compiled, layer)
        )
        torch.testing.assert_close(found, expected)
        recompiling_fails()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend, dynamic", [("aot_eager", True), ("inductor", None)])
def test_dropout_compiles_with_a_new_mask_in_each_call(device, backend, dynamic, recompiling_fails):
    """The branch is linear in A and W is 0, so <y, dy> = <A, dA> if both passes have one mask.

    Exactly: all are small integers.
    """
    model = torch.nn.Sequential(torch.nn.Linear(24, 16, bias=False)).to(device)
    torch.nn.init.zeros_(model[0].weight)
    swap_(model, r=R, lora_alpha=R, lora_dropout=0.5)
    for p in (model[0].lora_A, model[0].lora_B):
        p.data = torch.randint(-3, 4, p.shape, device=device).float()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    for x in batches(device):
        found, x = [], x.round_()
        for _ in range(2):
            y = compiled(x)
            dy = torch.randint_like(y, -3, 4)
            (da,) = torch.autograd.grad(y, model[0].lora_A, dy)
            assert (y * dy).sum() == (model[0].lora_A * da).sum() != 0
            found.append(y.detach())
            recompiling_fails()
        assert not torch.equal(*found)
    torch.compiler.set_stance("default")
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("device", DEVICES)
def test_inference_compiles(device):
    model = make_model(device, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            for x in batches(device, torch.bfloat16):
                torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["same", "float32"])
def test_operations_are_what_their_schemas_say(device, dtype, adapter, randn):
    adapter = adapter or dtype
    x, w, dy, bias = (
        randn(*s, dtype=dtype, device=device) for s in ((6, 24), (16, 24), (6, 16), (16,))
    )
    a, b = (randn(*s, dtype=adapter, device=device) for s in ((R, 24), (16, R)))
    backend = deltadiff.choose_path(x.device, dtype).backend
    op = torch.ops.deltadiff
    seed = torch.tensor(7, device=device)
    for gate, *dropout in (
        (None, 0.0, None),
        (randn(device=device), 0.5, seed),
        (randn(R, device=device), 0.0, None),
    ):
        args = x, w, a, b, 0.5, gate, bias, *dropout, backend
        opcheck(op.lora_linear_fwd.default, args)
        _, s = op.lora_linear_fwd(*args)
        for needs in ([True, True, True, gate is not None], [False, False, True, False]):
            kept = w, a, b, s, 0.5, gate, needs, *args[7:]
            opcheck(op.lora_linear_bwd.default, (dy, x if needs[1] else None, *kept))
        leaves = [t if t is None or t is w else t.clone().requires_grad_() for t in args[:4]]
        opcheck(op.lora_linear.default, (*leaves, *args[4:]))
        opcheck(op.lora_linear.default, (leaves[0].detach().view(2, 3, 24), *args[1:]))
