"""Layers of bitsandbytes with 4-bit weights as base layers of `LoraLinear`."""

import copy

import pytest
import torch
from four_bit import FORMATS
from lora_linear_calls import kept_by
from tolerance import relative_error
from torch import nn

from deltadiff import DeltaLoRA, lora_linear, merge_, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentTypeError, BackendUnavailableError
from deltadiff.layers import fused_branch
from deltadiff.layers.flora import swap_flora_
from deltadiff.ops.decode_4bit import FourBit, decode_4bit
from deltadiff.ops.reference import lora_linear_ref

bnb = pytest.importorskip("bitsandbytes")
accelerate = pytest.importorskip("accelerate")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
N, K = 48, 64
INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton interprets only where there is no GPU"
)


def linear_4bit(compute_dtype=F32, form=("nf4", 64, True), bias=True, kind=None, **how):
    quant_type, blocksize, nested = form
    torch.manual_seed(0)
    layer = (kind or bnb.nn.Linear4bit)(
        K, N, bias=bias, compute_dtype=compute_dtype, quant_type=quant_type,
        compress_statistics=nested, **how,
    )  # fmt: skip
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


def swapped(base=None, backend="cpp", **options):
    """A model of one layer with a trained pair, and that layer."""
    model = nn.Sequential(linear_4bit() if base is None else base)
    swap_(model, r=4, seed=1, backend=backend, **options)
    torch.manual_seed(2)
    nn.init.normal_(model[0].lora_B)
    return model, model[0]


def expected(layer, x, a=None, b=None, gate=1.0):
    """y in float64, from the W that the bits stand for."""
    a, b = layer.lora_A if a is None else a, layer.lora_B if b is None else b
    w = decode_4bit(FourBit.of(layer.weight), torch.float64)
    branch = x.double() @ a.double().T * gate @ b.double().T
    return x.double() @ w.T + (0 if layer.bias is None else layer.bias) + layer.scaling * branch


@pytest.fixture
def fused(monkeypatch):
    """The calls of `lora_linear` over weights of 4 bits."""
    calls, ours = [], fused_branch.lora_linear

    def count(x, weight, *args, **options):
        if isinstance(weight, FourBit):
            calls.append((x.dtype, options["backend"]))
        return ours(x, weight, *args, **options)

    monkeypatch.setattr(fused_branch, "lora_linear", count)
    return calls


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=INTERPRETED), "cpp"])
@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
def test_the_fused_pass(backend, form, fused, randn):
    model, layer = swapped(linear_4bit(F32, form), backend=backend)
    x = randn(3, 5, K).requires_grad_()
    leaves = [x, layer.lora_A, layer.lora_B]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    found, truth = [], []
    for y, of, into in ((model(x), leaves, found), (expected(layer, *doubles), doubles, truth)):
        into += [y, *torch.autograd.grad(y.square().sum(), of)]
    for ours, theirs in zip(found, truth, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    assert fused == [(F32, backend)] and not layer.bias.requires_grad


@pytest.mark.parametrize("given", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("compute", [None, BF16, F32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_computes_in_the_dtype_of_the_base_layer(given, compute, autocast, fused, randn):
    model, layer = swapped(linear_4bit(compute))
    x = randn(6, K, dtype=given)
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = model(x)
        base = layer.base_layer(x)
    dtype = compute or given
    assert y.dtype == base.dtype == given and fused == [(dtype, "cpp")]
    op = lora_linear(
        x.to(dtype), FourBit.of(layer.weight), layer.lora_A, layer.lora_B,
        scaling=layer.scaling, bias=layer.bias.to(dtype),
    )  # fmt: skip
    assert torch.equal(y, op.to(given))


def test_gates_dropout_and_no_bias(fused, randn):
    model, layer = swapped(linear_4bit(bias=False), lora_dropout=0.5)
    x = randn(8, K)
    layer.gate = randn(4).requires_grad_()
    first, again = model(x), model(x)
    assert not torch.equal(first, again)
    model.eval()
    y = model(x)
    torch.testing.assert_close(
        y.double(), expected(layer, x, gate=layer.gate), rtol=1e-5, atol=1e-5
    )
    y.sum().backward()
    assert layer.gate.grad.abs().min() > 0 and len(fused) == 3


def test_a_core_of_flora(fused, randn):
    model = nn.Sequential(linear_4bit())
    swap_flora_(model, r=4, seed=1, backend="cpp")
    layer, x = model[0], randn(8, K)
    with torch.no_grad():
        layer.gate.copy_(randn(4, 4))
    params = [layer.lora_A, layer.gate, layer.lora_B]
    a, g, b = doubles = [p.detach().double().requires_grad_() for p in params]
    y, truth = model(x), expected(layer, x, g @ a, b)
    found = torch.autograd.grad(y.square().sum(), params)
    exact = torch.autograd.grad(truth.square().sum(), doubles)
    for ours, theirs in zip((y, *found), (truth, *exact), strict=True):
        assert relative_error(ours, theirs) < 1e-6
    assert fused == [(F32, "cpp")]
    with pytest.raises(ArgumentTypeError, match="quantised"):
        merge_(model)


def test_the_update_of_delta_lora_is_factored(fused, randn):
    model, layer = swapped()
    with pytest.raises(ArgumentTypeError, match="quantised.*w_update='factored'"):
        DeltaLoRA(model, update_ratio=0.5, w_update="inplace")
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    bits, x = layer.weight.detach().clone(), randn(8, K)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    y, calls = model(x), len(fused)
    delta = layer.branch_delta
    assert delta.rank == 8 and calls == 5 and torch.equal(layer.weight, bits)
    update = 0.5 * (layer.lora_B @ layer.lora_A - delta.anchor_B @ delta.anchor_A)
    y_expected = expected(layer, x) + layer.scaling * x.double() @ update.double().T
    assert relative_error(y, y_expected) < 1e-6
    with pytest.raises(ArgumentTypeError, match="quantised"):
        merge_(model)


def test_state_and_copies(randn):
    base = linear_4bit()
    keys = set(base.state_dict(prefix="0."))
    model, layer = swapped(base)
    state = model.state_dict()
    assert set(state) == keys | {"0.lora_A", "0.lora_B"}
    assert not any("quant" in name for name in vars(layer)), "the layer keeps nothing decoded"
    x = randn(4, K)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    fresh, _ = swapped(linear_4bit(form=("nf4", 64, True)))
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    unswap_(model)
    assert model[0] is base and base.weight.quant_state is not None


def test_what_autograd_keeps(randn):
    model, layer = swapped()
    _, kept = kept_by(model, randn(4, K).requires_grad_())
    assert kept and max(t.numel() * t.element_size() for t in kept) <= layer.weight.numel()
    assert not any(t.data_ptr() == layer.weight.data_ptr() for t in kept)


def test_training_beside_bytes_stored_as_another_dtype(fused, randn):
    """A quantised model that FSDP can shard; today `swap_` refused such weights."""
    model, layer = swapped(linear_4bit(quant_storage=BF16))
    assert layer.weight.dtype == BF16
    x = randn(4, K)
    assert relative_error(model(x), expected(layer, x)) < 1e-6
    with pytest.raises(ArgumentTypeError, match="quantised"):
        DeltaLoRA(model, w_update="inplace")
    assert len(fused) == 1


# ------------------------------------------------- where the base layer's own product stays


class Own(bnb.nn.Linear4bit):
    """Somebody's class with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def unchanged(base):
    return base


def hooked(base):
    base.register_forward_hook(lambda module, args, y: 2 * y)
    return base


def forwarded(base):
    theirs = base.forward
    base.forward = lambda x: 2 * theirs(x)
    return base


def offloading(base):
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.SequentialHook())
    return base


@pytest.mark.parametrize(
    ("make", "kind", "backend", "told"),
    [
        (unchanged, Own, "cpp", "Own has a forward pass of its own"),
        (hooked, None, "cpp", "hooks on it"),
        (forwarded, None, "cpp", "a forward pass that was put on it"),
        (offloading, None, "cpp", "a forward pass that was put on it"),
        (unchanged, None, "reference", "asked for"),
        (unchanged, None, None, "which is faster on a CPU"),
    ],
)
def test_the_base_layer_is_called(make, kind, backend, told, fused, randn):
    base = make(linear_4bit(kind=kind))
    x = randn(4, K)
    y = base(x)
    model = nn.Sequential(base)
    report = swap_(model, r=2, backend=backend)
    assert torch.equal(model(x), y) and not fused  # B = 0
    assert report.rows[0].path == "reference"
    assert report.rows[0].reason == f"4-bit weight: the base layer's own product ({told})"
    nn.init.normal_(model[0].lora_B)
    branch = model[0].scaling * (x @ model[0].lora_A.T) @ model[0].lora_B.T
    torch.testing.assert_close(model(x), y + branch)


def test_a_weight_that_was_repacked_for_the_cpu(fused, randn):
    model, layer = swapped(linear_4bit())
    layer.weight.quant_state.packing_format_for_cpu = True
    assert "repacked" in swap_report(model).rows[0].reason
    layer.weight.quant_state.packing_format_for_cpu = False
    assert swap_report(model).rows[0].path == "cpp"
    layer.weight.quant_state.shape = torch.Size((K, N))
    assert "quantised as 64 x 48" in swap_report(model).rows[0].reason


def test_hooks_that_only_move_inputs_change_nothing(fused, randn):
    """transformers puts them on each layer of a quantised model, also on one device."""
    base = linear_4bit()
    hook = accelerate.hooks.AlignDevicesHook("cpu")
    accelerate.hooks.add_hook_to_module(base, hook)
    model, layer = swapped(base)
    x = randn(4, K)
    assert relative_error(model(x), expected(layer, x)) < 1e-6
    assert len(fused) == 1
    hook.offload = True
    assert "a forward pass that was put on it" in swap_report(model).rows[0].reason


def test_the_report_and_what_cannot_run():
    model, _ = swapped()
    (row,) = swap_report(model).rows
    assert row.path == "cpp" and row.reason == "asked for; 4-bit weight: decoded in each pass"
    with pytest.raises(BackendUnavailableError, match="hopper"):
        swap_(nn.Sequential(linear_4bit()), r=2, backend="hopper")


def test_rows_that_are_no_whole_blocks(fused, randn):
    """The product of bitsandbytes for the CPU is wrong then, so it is not asked."""
    base = bnb.nn.Linear4bit(96, 64, compute_dtype=F32, quant_type="nf4").to("cpu")
    model, layer = swapped(base, backend=None)
    x = randn(8, 96)
    assert relative_error(model(x), expected(layer, x)) < 1e-6 and len(fused) == 1
    assert swap_report(model).rows[0].path == "cpp"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_model_is_one_graph(device, randn):
    torch._dynamo.reset()
    base = linear_4bit(F32 if device == "cpu" else BF16).to(device)
    model, layer = swapped(base, backend="cpp" if device == "cpu" else None)
    x = randn(4, K, device=device).requires_grad_()
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))])
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_on_a_gpu(tokens, fused, randn, assert_close):
    """bitsandbytes quantises on the GPU; the kernels of each number of tokens read its bytes."""
    base = bnb.nn.Linear4bit(1024, 768, compute_dtype=BF16, quant_type="nf4").to("cuda")
    model, layer = swapped(base, backend=None)
    theirs = bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)
    decoded = decode_4bit(FourBit.of(base.weight), theirs.dtype)
    assert torch.equal(decoded, theirs)
    leaves = [randn(tokens, 1024, dtype=BF16, device="cuda"), layer.lora_A, layer.lora_B]
    leaves[0].requires_grad_()
    dy = randn(tokens, 768, dtype=BF16, device="cuda")

    def outputs(function, tensors):
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    def eager(x, a, b):
        w = decoded.to(x.dtype)
        bias = base.bias.to(x.dtype)
        return lora_linear_ref(x, w, a, b, scaling=layer.scaling, bias=bias)

    ours = outputs(lambda x, *_: model(x), leaves)
    theirs = outputs(eager, leaves)
    truth = outputs(eager, [t.detach().double().requires_grad_() for t in leaves])
    for i, results in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_close(*results, 3 if i else 2)
    assert fused == [(BF16, None)]
