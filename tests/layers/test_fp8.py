"""Layers in FP8, of transformers, torchao and deltadiff, as base layers of `LoraLinear`."""

import copy
import io
import re
from functools import partial

import pytest
import torch
from fp8 import dense_of, float8_linear, fp8_linear
from lora_linear_calls import kept_by
from tolerance import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltadiff import DeltaLoRA, merge_, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.float8_linear import Float8Linear
from deltadiff.ops.decode_fp8 import Float8, decode_fp8
from deltadiff.ops.reference import lora_linear_ref

F32, BF16 = torch.float32, torch.bfloat16
N, K = 150, 140


LAYERS = {
    "FP8Linear": lambda: fp8_linear(N, K),
    "one scale": lambda: fp8_linear(N, K, None, activation_scheme="static"),
    "powers of two": lambda: fp8_linear(N, K, scale_fmt="ue8m0", bias=False),
    "blocks": lambda: float8_linear(N, K),
    "rows": lambda: float8_linear(N, K, "row"),
    "tensor": lambda: float8_linear(N, K, "tensor", bias=False),
}


@pytest.fixture(params=LAYERS)
def base(request):
    return LAYERS[request.param]()


def swapped(base, **options):
    """A model of one layer with a trained pair, and that layer."""
    model = nn.Sequential(base)
    swap_(model, r=4, seed=1, **options)
    torch.manual_seed(2)
    nn.init.normal_(model[0].lora_B)
    return model, model[0]


def test_output_and_gradients(base, randn):
    truth, keys = nn.Sequential(dense_of(base)), set(base.state_dict(prefix="0."))
    model, layer = swapped(base)
    swap_(truth, r=4)
    for name in ("lora_A", "lora_B"):
        getattr(truth[0], name).data.copy_(getattr(layer, name))
    x = randn(3, 5, K)
    found = []
    for net in (model, truth):
        given = x.to(net[0].lora_A.dtype).requires_grad_()
        y = net(given)
        leaves = given, net[0].lora_A, net[0].lora_B
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, expected in zip(*found, strict=True):
        assert relative_error(ours, expected) < 2e-6
    assert set(model.state_dict()) == keys | {"0.lora_A", "0.lora_B"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.lora_A", "0.lora_B"]
    (row,) = swap_report(model).rows
    assert row.path == "cpp" and row.reason.endswith("FP8 weight: decoded in each pass")
    unswap_(model)
    assert model[0] is base and set(base.state_dict(prefix="0.")) == keys


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("given", [F32, BF16], ids=str)
def test_it_computes_in_the_dtype_of_its_input_or_of_autocast(given, autocast, randn):
    for base in (fp8_linear(N, K, dtype=BF16), float8_linear(N, K, dtype=BF16)):
        x = randn(6, K, dtype=given)
        model, _ = swapped(copy.deepcopy(base))
        for net in [model, *([base] if type(base) is Float8Linear else [])]:
            with torch.autocast("cpu", BF16, enabled=autocast):
                y = net(x)
            assert y.dtype == (BF16 if autocast else given)
            truth = dense_of(base)(x.double())
            if net is model:
                branch = x.double() @ net[0].lora_A.double().T @ net[0].lora_B.double().T
                truth = truth + net[0].scaling * branch
            assert relative_error(y, truth) < (0.01 if y.dtype == BF16 else 2e-6)


def test_moves_states_and_copies(base, randn):
    model, layer = swapped(base)
    scales = layer.weight_scale_inv
    bits, scale = layer.weight.detach().view(torch.uint8).clone(), scales.detach().clone()
    x = randn(4, K)
    y = model(x)
    torch.save(model, saved := io.BytesIO())  # pickle alone cannot do FP8 in torch 2.13
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert torch.equal(twin(x), y)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.to(BF16).half().type(BF16).float()
    assert torch.equal(layer.weight.view(torch.uint8), bits), "a cast would leave out the scales"
    assert (
        torch.equal(layer.weight_scale_inv, scale) and layer.weight_scale_inv.dtype == scale.dtype
    )
    assert layer.lora_A.dtype == F32
    with torch.no_grad():
        layer.weight.view(torch.uint8).zero_()
    model.load_state_dict(state)
    assert torch.equal(model(x), y)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), y)
    without = {n: t for n, t in state.items() if "scale_inv" not in n}
    dense = {**state, "0.weight": state["0.weight"].to(BF16)}
    for wrong, told in ((without, "without 0.weight_scale_inv"), (dense, "0.weight is bfloat16")):
        for net in (model, nn.Sequential(unswapped(model))):
            own = {n: t for n, t in wrong.items() if "lora" not in n or net is model}
            if net is not model and type(net[0]) is not Float8Linear:
                continue  # transformers' own
            with pytest.raises(RuntimeError, match=told):
                net.load_state_dict(own, strict=False)


def unswapped(model):
    return unswap_(copy.deepcopy(model))[0]


def test_the_update_of_delta_lora_is_factored(base, randn):
    model, layer = swapped(base)
    with pytest.raises(ArgumentTypeError, match="quantised.*w_update='factored'"):
        DeltaLoRA(model, update_ratio=0.5, w_update="inplace")
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    truth = dense_of(base)
    bits, x = layer.weight.detach().view(torch.uint8).clone(), randn(8, K)
    for _ in range(4):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = layer.branch_delta
    assert delta.rank == 8 and torch.equal(layer.weight.view(torch.uint8), bits)
    update = 0.5 * (layer.lora_B @ layer.lora_A - delta.anchor_B @ delta.anchor_A)
    change = layer.lora_B.double() @ layer.lora_A.double() + update
    expected = truth(x.double()) + layer.scaling * x.double() @ change.T
    assert relative_error(model(x), expected) < 2e-6
    with pytest.raises(ArgumentTypeError, match="quantised"):
        merge_(model)


def test_nothing_of_the_size_of_W_is_kept(base, randn):
    model, layer = swapped(base)
    nets = [model] + [base] * (type(base) is Float8Linear)
    for net in nets:
        _, kept = kept_by(net, randn(4, K).requires_grad_())
        assert all(t.numel() < layer.weight.numel() / 8 for t in kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_model_is_one_graph(base, device, randn):
    torch._dynamo.reset()
    dtype = F32 if device == "cpu" else BF16
    model, layer = swapped(base.to(device))
    x = randn(4, K, dtype=dtype, device=device).requires_grad_()
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.sum(), (x, layer.lora_A, layer.lora_B))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, randn):
    model, layer = swapped(float8_linear(N, K))
    found, x = [], randn(4, K)
    for wrap in (False, True):
        leaves = [x.clone().requires_grad_(), layer.lora_A, layer.lora_B]
        model.zero_grad()
        y = checkpoint(model, leaves[0], use_reentrant=reentrant) if wrap else model(leaves[0])
        y.square().sum().backward()
        found.append([y, *(t.grad for t in leaves)])
    assert all(map(torch.equal, *found))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300, 1000])
@pytest.mark.parametrize("make", [fp8_linear, partial(float8_linear, granularity="row")])
def test_on_a_gpu(make, tokens, randn, assert_close):
    """The kernels of each number of tokens, on transformers' layer and on our own."""
    base = make(768, 1024, dtype=BF16).to("cuda")
    truth = dense_of(base)
    model, layer = swapped(base)
    leaves = [randn(tokens, 1024, dtype=BF16, device="cuda"), layer.lora_A, layer.lora_B]
    leaves[0].requires_grad_()
    dy = randn(tokens, 768, dtype=BF16, device="cuda")

    def outputs(function, tensors):
        y = function(*tensors)
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    def eager(x, a, b):
        w, bias = decode_fp8(Float8.of(base), BF16).to(x.dtype), base.bias.to(x.dtype)
        return lora_linear_ref(x, w, a, b, scaling=layer.scaling, bias=bias)

    ours = outputs(lambda x, *_: model(x), leaves)
    theirs = outputs(eager, leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    for i, results in enumerate(zip(ours, theirs, outputs(eager, doubles), strict=True)):
        assert_close(*results, 3 if i else 2)
    branch = layer.scaling * doubles[0] @ doubles[1].T @ doubles[2].T
    assert relative_error(ours[0], truth(doubles[0]) + branch) < 0.01


# ------------------------------------------------------------------------ what cannot be taken


def wrong_shape(layer):
    layer.block_size = (64, 64)


def wrong_dtype(layer):
    layer.weight_scale_inv = nn.Parameter(torch.ones(2, 2).byte(), requires_grad=False)


def no_scale(layer):
    layer.weight_scale_inv = None


def cast(layer):
    layer.weight = nn.Parameter(layer.weight.to(BF16), requires_grad=False)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, y: 2 * y)


def forwarded(layer):
    layer.forward = lambda x: x


def sized_otherwise(layer):
    layer.in_features = K + 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (wrong_shape, r"weight.scale: got shape \(2, 2\); accepted: shape \(3, 3\)"),
        (wrong_dtype, "weight.scale: got dtype torch.uint8; accepted: torch.float32 or"),
        (no_scale, "weight: got torch.float8_e4m3fn without scales"),
        (cast, "its weight is bfloat16 beside scales of FP8"),
        (hooked, "hooks on it would be dropped"),
        (forwarded, "has a forward pass of its own"),
        (sized_otherwise, r"its weight has the shape \(150, 140\)"),
    ],
)
def test_what_does_not_fit_is_refused_or_left_out(change, told):
    for make in (fp8_linear, float8_linear):
        model = nn.ModuleDict({"wrong": make(N, K), "right": fp8_linear(N, K)})
        change(model["wrong"])
        before = list(model.modules())
        with pytest.raises(ArgumentTypeError, match=told):
            swap_(model, r=2, target_modules=["wrong"])
        assert list(model.modules()) == before
        report = swap_(model, r=2)
        assert [row.module for row in report.rows] == ["right"]
        assert re.search(told, report.coverage.left_out[0].reason)


def test_bare_FP8_is_no_linear_layer():
    model = nn.Sequential(nn.Linear(8, 8).to(torch.float8_e4m3fn))
    with pytest.raises(ArgumentTypeError, match="FP8 cannot be taken.*without scales"):
        swap_(model, r=2)


def test_the_report_tells_what_is_computed_otherwise(monkeypatch):
    static = fp8_linear(N, K, None, activation_scheme="static")
    model = nn.Sequential(fp8_linear(N, K), fp8_linear(N, N), static, float8_linear(N, K))
    notes = swap_(model, r=2).notes
    counted = "weights in FP8 that are decoded"
    would = "FP8Linear itself would quantise the activations, too"
    assert notes == (
        f"{counted}: 2; {would}",
        f"{counted}: 1; {would} (its activation_scale is not used)",
    )
    from transformers.integrations import finegrained_fp8

    monkeypatch.delattr(finegrained_fp8, "FP8LinearFunction", raising=False)
    assert swap_report(model).notes[0] == f"{counted}: 2; {would}, and give no gradient of them"
