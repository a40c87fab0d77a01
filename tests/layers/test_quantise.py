"""`quantise_` puts layers in FP8 in: which, how near they are, and what it refuses."""

import copy
import math
import weakref

import pytest
import torch
from fp8 import dense_of
from small_models import build
from tolerance import relative_error
from torch import nn

from deltadiff import quantise_, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers import quantise
from deltadiff.layers.float8_linear import Float8Linear
from deltadiff.ops.decode_fp8 import Float8
from deltadiff.ops.reference_fp8 import quantise_fp8_ref

BF16 = torch.bfloat16


def in_fp8(model):
    return {name for name, m in model.named_modules() if isinstance(m, Float8Linear)}


@pytest.mark.parametrize("granularity", quantise.GRANULARITIES)
def test_the_layers_and_the_report(granularity, monkeypatch):
    monkeypatch.setattr(quantise, "_BLOCK", 1000)  # of these weights a part at once
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(200, 300, dtype=BF16), nn.ReLU(), nn.Linear(300, 64, bias=False)
    )
    weights, bias = [model[i].weight.detach().clone() for i in (0, 2)], model[0].bias
    report = quantise_(model.eval(), "fp8", granularity=granularity)
    assert in_fp8(model) == {"0", "2"} and not model[0].training and model[0].bias is bias
    blocks = {"block": (128, 128), "row": (1, None), "tensor": (None, None)}[granularity]
    count = 0
    for layer, w, row in zip((model[0], model[2]), weights, report.rows, strict=True):
        sides = tuple(side or size for side, size in zip(blocks, w.shape, strict=True))
        data, scale = quantise_fp8_ref(w, sides)
        assert Float8.of(layer).block == sides and layer.dtype_before == w.dtype
        assert torch.equal(layer.weight.view(torch.uint8), data.view(torch.uint8))
        assert torch.equal(layer.weight_scale_inv, scale)
        assert not layer.weight.requires_grad and not layer.weight_scale_inv.requires_grad
        error = relative_error(dense_of(layer).weight, w.double())
        assert math.isclose(row.error, error, rel_tol=1e-5) and 0.01 < error < 0.04
        assert row.dtype == w.dtype and row.shape == tuple(w.shape)
        count += w.numel() + 4 * scale.numel()
    assert report.after == count and report.before == 2 * 60000 + 4 * 19200
    assert f"2 layers in FP8, a scale for each {granularity}: 0.1 MiB instead of 0.2" in str(report)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", quantise.GRANULARITIES)
def test_a_gpu_gives_the_bits_of_the_cpu(granularity):
    torch.manual_seed(0)
    cpu = nn.Sequential(nn.Linear(1000, 700, dtype=BF16))
    gpu = copy.deepcopy(cpu).cuda()
    for model in (cpu, gpu):
        quantise_(model, "fp8", granularity=granularity)
    for name, t in cpu.state_dict().items():
        assert torch.equal(gpu.state_dict()[name].cpu().float(), t.float()), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_models_without_their_heads(name):
    model, ids = build(name), torch.randint(3, 40, (2, 8))
    expected = model(ids).logits
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    report = quantise_(model, "fp8")
    assert in_fp8(model) == linear - {"lm_head", "classifier"}
    reasons = {group.name: group.reason for group in report.left_out}
    head = {"llama": "lm_head", "gpt2": "transformer.wte", "bert": "classifier"}[name]
    assert reasons[head] in ("the output head", "an embedding", "part of a new head")
    assert "not quantised:" in str(report) and reasons[head] in str(report)
    assert 1e-4 < relative_error(model(ids).logits, expected.double()) < 0.05
    again = build(name, seed=1)
    quantise_(again, "fp8")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_one_weight_after_the_other_is_let_go(monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    weights, alive, quantised = [weakref.ref(m.weight) for m in model], [], quantise._quantised

    def count(*args):
        alive.append(sum(weight() is not None for weight in weights))
        return quantised(*args)

    monkeypatch.setattr(quantise, "_quantised", count)
    quantise_(model, "fp8")
    assert alive == [3, 2, 1]


def test_a_module_in_two_places_stays_one():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    report = quantise_(model, "fp8")
    assert model["a"] is model["b"][0] and isinstance(model["a"], Float8Linear)
    assert len(report.rows) == 1


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 8), "bad": nn.Linear(8, 6, bias=False)})
    model["bad"].weight = model["embed"].weight
    return model


def trained():
    model = nn.ModuleDict({"bad": nn.Linear(8, 6)})
    model["bad"](torch.ones(1, 8)).sum().backward()
    return model


def already():
    model = nn.ModuleDict({"bad": nn.Linear(8, 6)})
    quantise_(model, "fp8")
    return model


def hooked():
    model = nn.ModuleDict({"bad": nn.Linear(8, 6)})
    model["bad"].register_forward_hook(lambda module, args, y: 2 * y)
    return model


def computed():
    return nn.ModuleDict({"bad": nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))})


REFUSED = {
    tied: "its weight is tied: embed and bad hold the same",
    trained: "its weight has a gradient: it is being trained",
    already: "its weight is quantised already", hooked: "hooks on it would be dropped",
    computed: "computed by a parametrisation",
}  # fmt: skip


@pytest.mark.parametrize("make", REFUSED)
def test_what_cannot_be_quantised_is_refused_by_name_and_else_left_out(make):
    model = make()
    before = list(model.modules())
    for targets in (["bad"], lambda name, module: name == "bad", "all-linear"):
        with pytest.raises(ArgumentTypeError, match=REFUSED[make]):
            quantise_(model, "fp8", target_modules=targets)
    assert list(model.modules()) == before
    model["good"] = nn.Linear(8, 6)
    report = quantise_(model, "fp8")
    assert [row.module for row in report.rows] == ["good"]
    if make is not already:
        assert any(REFUSED[make] in group.reason for group in report.left_out)


def test_wrong_arguments_change_nothing():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    before = list(model.modules())
    for given, told in (
        (("fp8",), "granularity: got 'column'; accepted: 'block', 'row', 'tensor'"),
        (("int8",), "format: got 'int8'; accepted: 'fp8'"),
    ):
        with pytest.raises(ArgumentError, match=told):
            quantise_(model, *given, granularity="column" if given == ("fp8",) else "block")
    with pytest.raises(ArgumentTypeError, match="model: got int"):
        quantise_(3, "fp8")
    with pytest.raises(ArgumentError, match="granularity: got None"):
        quantise_(model, "fp8", granularity=None)
    with pytest.raises(ArgumentError, match="which matches no linear layer"):
        quantise_(model, "fp8", target_modules=["q_proj"])
    for wrong, dtype in ((torch.nan, BF16), (-torch.inf, torch.float32), (1e39, torch.float64)):
        model[1].to(dtype).weight.data[2, 3] = wrong
        with pytest.raises(ArgumentError, match="weight of 1: got inf or NaN; accepted: finite"):
            quantise_(model, "fp8")
        model[1].weight.data[2, 3] = 0
    assert list(model.modules()) == before
    swap_(model, r=2)
    with pytest.raises(SwapError, match="swapped layers; accepted: `quantise_` before `swap_`"):
        quantise_(model, "fp8")


class Wrapped(nn.parallel.DistributedDataParallel):
    """As it is with the processes of a group, which this test does without."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def test_a_model_in_ddp_is_refused():
    model = Wrapped(nn.Sequential(nn.Linear(8, 6)))
    with pytest.raises(SwapError, match="DistributedDataParallel; accepted: `quantise_` before"):
        quantise_(model, "fp8")
    assert type(model.module[0]) is nn.Linear


def test_models_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 6))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        ArgumentTypeError, match="PEFT's layers; accepted: the base model: `quantise_` that"
    ):
        quantise_(model, "fp8")
