"""PEFT's layers on weights of bitsandbytes: fused where they have 4 bits, PEFT's own for 8 bits."""

import copy
import pickle

import peft
import pytest
import torch
from four_bit import FORMATS
from peft_checks import fused_calls, input_of, passes, swap_quietly
from tolerance import relative_error
from torch import nn

from deltadiff import DeltaLoRA, swap_, unswap_
from deltadiff.errors import ArgumentTypeError, BackendUnavailableError, SwapError
from deltadiff.layers.delta_state import LostUpdateWarning
from deltadiff.layers.peft.fused_linear import Fused
from deltadiff.ops.decode_4bit import FourBit, decode_4bit

bnb = pytest.importorskip("bitsandbytes")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NAME = "base_model.model.first"


class Two(nn.Module):
    """Two quantised layers, in a model that says so as transformers' do, which PEFT asks.

    Their rows are whole blocks: else bitsandbytes' product on the CPU is wrong (0.50).
    """

    def __init__(self, compute_dtype=F32, form=("nf4", 64, True)):
        super().__init__()
        quant_type, _, nested = form
        torch.manual_seed(0)
        how = dict(quant_type=quant_type, compress_statistics=nested, compute_dtype=compute_dtype)
        self.first = bnb.nn.Linear4bit(64, 128, **how)
        self.second = bnb.nn.Linear4bit(128, 64, bias=False, **how)
        self.is_loaded_in_4bit = True
        self.to("cpu")

    def forward(self, x):
        return self.second(self.first(x).tanh())


def adapted(base=None, **options):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"]} | options
    torch.manual_seed(1)
    config = peft.LoraConfig(init_lora_weights=False, **config)
    return peft.get_peft_model(Two() if base is None else base, config)


def assert_same(found, expected, limit=2e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert relative_error(found[name], value.double()) < limit, name


OPTIONS = {
    "plain": {}, "rslora": {"use_rslora": True}, "ranks": {"rank_pattern": {"first": 7}},
    "one of two": {"target_modules": ["second"]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS[:3], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_results_by_one_call_a_layer(options, form):
    model, x = adapted(Two(form=form), **OPTIONS[options]), input_of()
    expected, state = passes(model, x), {n: t.clone() for n, t in model.state_dict().items()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    report = swap_(model, backend="cpp")
    assert {row.path for row in report.rows} == {"cpp"}
    assert "4-bit weight: decoded in each pass" in str(report)
    with fused_calls(model) as calls:
        assert_same(passes(model, x), expected)
    assert calls.total() == len(calls) == len(report.rows)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert trained == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("given", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("compute", [None, BF16, F32], ids=str)
def test_dtypes_are_those_of_bitsandbytes(given, compute):
    model, x = adapted(Two(compute)), input_of(given)
    expected = passes(model, x)
    swap_(model, backend="cpp")
    with fused_calls(model) as calls:
        found = passes(model, x)
    lowest = {BF16, F16} & {given, compute}
    limit = 2e-6 if not lowest else 0.03 if BF16 in lowest else 0.004
    assert calls.total() == 2
    assert_same(found, expected, limit)


def test_autocast_and_dropout():
    model, x = adapted(Two(BF16), lora_dropout=0.5), input_of()
    swap_(model, backend="cpp")
    with fused_calls(model) as calls, torch.autocast("cpu", BF16):
        first, again = model(x), model(x)
    assert calls.total() == 4 and first.dtype == F32 and not torch.equal(first, again)
    model.eval()
    expected = model(x)
    unswap_(model)
    assert relative_error(model(x), expected.double()) < 0.03
    assert type(model.get_submodule(NAME)) is peft.tuners.lora.Linear4bit


def test_several_adapters_are_one_product():
    model, x = adapted(), input_of()
    model.add_adapter(
        "more", peft.LoraConfig(r=3, target_modules=["first"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "more"])
    expected = passes(model, x)
    swap_(model, backend="cpp")
    with fused_calls(model) as calls:
        assert_same(passes(model, x), expected)
    assert calls.total() == 2
    model.set_adapter("more")
    with model.disable_adapter(), fused_calls(model) as calls:
        base = model(x)
    assert not calls and not torch.equal(base, model(x))


def test_merging_is_pefts():
    """PEFT rounds the merged weight to 4 bits again, so nothing is equal but to PEFT's own."""
    theirs, ours = adapted(), adapted()
    swap_(ours, backend="cpp")
    x = input_of()
    for model in (theirs, ours):
        with pytest.warns(UserWarning, match="rounding errors"):
            model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    for model in (theirs, ours):
        with pytest.warns(UserWarning, match="rounding errors"):
            model.unmerge_adapter()
    with fused_calls(ours) as calls:
        assert relative_error(ours(x), theirs(x).detach().double()) < 2e-6
    assert calls.total() == 2, "PEFT made new weights, which are decoded like those before"


def test_delta_lora_is_factored():
    model, x = adapted(target_modules=["first"]), input_of()
    swap_(model, backend="cpp")
    with pytest.raises(ArgumentTypeError, match="w_update='factored'"):
        DeltaLoRA(model, update_ratio=0.5, w_update="inplace")
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    layer = model.get_submodule(NAME)
    bits = layer.base_layer.weight.detach().clone()
    for _ in range(4):
        passes(model, x)
        optimizer.step()
    with fused_calls(model) as calls:
        y = layer(x)
    assert calls.total() == 1 and torch.equal(layer.base_layer.weight, bits)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    delta = layer.deltas["default"]
    w = decode_4bit(FourBit.of(layer.base_layer.weight), torch.float64)
    w = w + 2 * (b @ a) + 2 * 0.5 * (b @ a - delta.anchor_B @ delta.anchor_A)
    assert relative_error(y, x.double() @ w.T + layer.base_layer.bias) < 2e-6
    with pytest.warns(LostUpdateWarning, match="export_peft"):
        state = model.state_dict()
    fresh = adapted(target_modules=["first"])
    swap_(fresh, backend="cpp")
    theirs = {"absmax", "quant"}  # what Linear4bit saves and does not load
    fresh.load_state_dict({n: t for n, t in state.items() if not any(x in n for x in theirs)})
    assert torch.equal(fresh(x), model(x))


def test_copies_and_pickles():
    model, x = adapted(), input_of()
    swap_(model, backend="cpp")
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        assert sum(isinstance(m, Fused) for m in twin.modules()) == 2
        assert repr(twin) == repr(model)


def test_the_weight_is_read_anew():
    """bitsandbytes keeps what is beside the bytes in an object that others may replace."""
    model, x = adapted(target_modules=["first"]), input_of()
    swap_(model, backend="cpp")
    layer = model.get_submodule(NAME)
    layer(x)
    state = layer.base_layer.weight.quant_state
    state.absmax, state.offset = state.absmax.flip(0), state.offset * 2
    w = decode_4bit(FourBit.of(layer.base_layer.weight), torch.float64)
    w = w + 2 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
    assert relative_error(layer(x), x.double() @ w.T + layer.base_layer.bias) < 2e-6


# ---------------------------------------------------------------- what stays PEFT's own


def of_base(change):
    return lambda model: change(model.get_submodule(NAME).base_layer)


REASONS = {
    "hooks on it": of_base(lambda base: base.register_forward_hook(lambda *_: None)),
    "a forward pass that was put on it": of_base(lambda b: setattr(b, "forward", b.forward)),
}


@pytest.mark.parametrize("told", REASONS)
def test_pefts_own_forward_pass(told):
    model, x = adapted(target_modules=["first"]), input_of()
    expected = passes(model, x)
    REASONS[told](model)
    report = swap_quietly(model, backend="cpp")
    assert report.rows[0].path == "peft" and told in report.rows[0].reason
    with fused_calls(model) as calls:
        found = passes(model, x)
    assert not calls and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("told", REASONS)
def test_what_happens_to_the_layer_later_is_noticed(told):
    model, x = adapted(target_modules=["first"]), input_of()
    expected = passes(model, x)
    swap_(model, backend="cpp")
    passes(model, x)
    REASONS[told](model)
    with fused_calls(model) as calls:
        found = passes(model, x)
    assert not calls and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants(options):
    model, x = adapted(**options), input_of()
    expected = passes(model, x)
    report = swap_quietly(model, backend="cpp")
    assert {row.path for row in report.rows} == {"peft"}
    found = passes(model, x)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_backends():
    model = adapted()
    with pytest.raises(BackendUnavailableError, match="hopper"):
        swap_(model, backend="hopper")
    assert not any(isinstance(m, Fused) for m in model.modules())
    for backend, told in (("reference", "asked for"), (None, "which is faster on a CPU")):
        report = swap_quietly(model, backend=backend)
        assert {row.path for row in report.rows} == {"peft"}
        assert report.rows[0].reason.endswith(f"the base layer's own product ({told})")
    expected = passes(model, input_of())
    for backend in ("cpp",) if torch.cuda.is_available() else ("cpp", "triton"):
        swap_(model, backend=backend)
        with fused_calls(model) as calls:
            assert_same(passes(model, input_of()), expected)
        assert calls.total() == 2


def test_8_bits_stay_pefts():
    base = nn.Sequential(bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False))
    base.is_loaded_in_8bit = True
    model = peft.get_peft_model(base.to("cpu"), peft.LoraConfig(r=2, target_modules=["0"]))
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear8bitLt
    with pytest.raises(SwapError, match="without a layer to make faster.*Linear8bitLt"):
        swap_(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_model_is_one_graph(device):
    torch._dynamo.reset()
    model = adapted(Two(F32 if device == "cpu" else BF16)).to(device)
    swap_(model, backend="cpp" if device == "cpu" else None)
    x = input_of().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = passes(compiled, x), passes(model, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
