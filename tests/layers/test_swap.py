"""`swap_` and `unswap_`: what is replaced, what is shared, what is frozen, what is refused."""

import copy

import pytest
import torch
from torch import nn
from two_blocks import Model, peft_model

import deltadiff
from deltadiff import LoraLinear, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError, SwapError
from deltadiff.layers.lora_layers import HoldsPairs
from deltadiff.ops import backends
from deltadiff.ops import dispatch as paths


def test_swap_shares_weights_and_freezes_the_rest():
    model = Model()
    before = {name: p for name, p in model.named_parameters()}
    x = torch.randn(5, 8)
    y = model(x)
    report = swap_(model, r=2, lora_alpha=6)
    assert [row.module for row in report.rows] == [
        "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj",
    ]  # fmt: skip
    torch.testing.assert_close(model(x), y)  # B = 0
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_" not in name:
            assert p is before[name]
    layer = model.layers[0].v_proj
    assert isinstance(layer, LoraLinear) and layer.scaling == 3.0 and layer.lora_alpha == 6
    assert layer.lora_A.shape == (2, 8) and layer.lora_B.shape == (6, 2)
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_report_prints_what_path_each_layer_takes_and_why():
    model = Model()
    text = str(swap_(model, r=2))
    assert "layers.1.v_proj" in text and "6 x 8" in text and "4 layers swapped" in text
    path = deltadiff.choose_path(torch.device("cpu"), torch.float32)
    assert path.backend in text and path.reason in text
    assert str(swap_report(model)) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"r": 7, "target_modules": ["v_proj"]}, "r: got 7; accepted: 1 to 6"),
        ({"r": 9}, "r: got 9; accepted: 1 to 8"),
        ({"r": 2.0}, "r: got 2.0"),
        ({"r": True}, "r: got True"),
        ({"lora_alpha": -1}, "lora_alpha: got -1"),
        ({"lora_alpha": 0}, "lora_alpha: got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout: got 1.0"),
        ({"use_rslora": 1}, "use_rslora: got 1"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": "("}, "regex"),
        ({"adapter_dtype": torch.float16}, "adapter_dtype"),
        ({"modules_to_save": ["haed"]}, "modules_to_save.*near ones: .*head"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_options_change_nothing(options, message):
    model = Model()
    with pytest.raises(ArgumentError, match=message):
        swap_(model, **{"r": 2, **options})
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_backend_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        model, backend = Model().cuda(), "cpp"
    else:
        model, backend = Model().double(), "cpp"
    with pytest.raises(BackendUnavailableError, match="backend"):
        swap_(model, r=2, backend=backend)


@pytest.mark.parametrize(("make", "options"), [(Model, {"r": 2}), (peft_model, {})])
def test_a_layer_that_a_backend_cannot_take_is_refused(make, options, monkeypatch):
    """The sm_90 kernel takes widths that are multiples of 8: q_proj is 8 x 8, v_proj 6 x 8."""
    monkeypatch.setattr(backends, "_why_no_hopper", lambda device, dtype: None)
    paths.choose_path.cache_clear()
    model = make()
    with pytest.raises(BackendUnavailableError, match="6 x 8: TMA"):
        swap_(model, backend="hopper", **options)
    assert not any(isinstance(m, HoldsPairs) for m in model.modules())
    model = Model()
    (row, _) = swap_(model, r=2, backend="hopper", target_modules=["q_proj"]).rows
    assert (row.path, row.reason) == ("hopper", "asked for")
    paths.choose_path.cache_clear()


@pytest.mark.gpu
def test_report_of_each_layer_on_a_gpu():
    model = Model().to("cuda", torch.bfloat16)
    rows = {row.module.rpartition(".")[2]: row for row in swap_(model, r=2).rows}
    if torch.cuda.get_device_capability() == (9, 0):
        assert rows["q_proj"].path == "hopper"
        assert "6 x 8: TMA" in rows["v_proj"].reason
    assert rows["v_proj"].path == "triton"


def test_model_must_be_a_module():
    with pytest.raises(ArgumentTypeError, match="model: got list"):
        swap_([], r=2)


def test_dtypes_of_adapters():
    half = Model().to(torch.bfloat16)
    swap_(half, r=2)
    assert half.layers[0].q_proj.lora_A.dtype == torch.float32
    half = Model().to(torch.bfloat16)
    swap_(half, r=2, adapter_dtype=torch.bfloat16)
    assert half.layers[0].q_proj.lora_B.dtype == torch.bfloat16
    with pytest.raises(ArgumentTypeError, match="adapter_dtype"):
        swap_(Model().double(), r=2, adapter_dtype=torch.float32)


def test_modules_to_save_stay_trainable():
    model = Model()
    swap_(model, r=2, modules_to_save=["head"])
    assert model.head.weight.requires_grad and isinstance(model.head, nn.Linear)


def test_seed_fixes_the_initial_values():
    a, b, c = Model(), Model(), Model()
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        swap_(model, r=2, seed=seed)
    pairs = [m.layers[0].q_proj.lora_A for m in (a, b, c)]
    assert torch.equal(pairs[0], pairs[1]) and not torch.equal(pairs[0], pairs[2])
    bound = 8**-0.5
    assert pairs[0].abs().max() <= bound


def test_one_module_in_two_places_stays_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    swap_(model, r=2)
    assert model[0] is model[2] and isinstance(model[0], LoraLinear)
    unswap_(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear


def test_unswap_restores_the_eager_model():
    model = Model()
    model.layers[0].norm.weight.requires_grad_(False)
    names = list(model.state_dict())
    modules = [model.layers[0].q_proj, model.head]
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    x = torch.randn(3, 8)
    y = model(x)
    swap_(model, r=2, target_modules=["q_proj"])
    swap_(model, r=3, target_modules=["v_proj"])  # a second call adds to the first
    assert model.layers[0].q_proj.lora_A.requires_grad and model.layers[1].v_proj.r == 3
    model.eval()
    unswap_(model)
    assert [model.layers[0].q_proj, model.head] == modules and list(model.state_dict()) == names
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert torch.equal(model(x), y) and not model.layers[0].q_proj.training
    with pytest.raises(SwapError, match="without swapped layers"):
        unswap_(model)


def test_swapped_model_can_be_copied_and_moved():
    model = Model()
    swap_(model, r=2)
    twin = copy.deepcopy(model)
    twin.to(torch.float64)
    assert twin.layers[0].q_proj.weight.dtype == torch.float64
    assert model.layers[0].q_proj.weight.dtype == torch.float32
    unswap_(twin)
    assert twin.layers[0].q_proj.weight.dtype == torch.float64
    assert torch.isfinite(twin(torch.randn(2, 8, dtype=torch.float64))).all()


def test_empty_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ArgumentTypeError, match="weight of 0"):
        swap_(model, r=1)


def test_all_linear_leaves_out_what_is_smaller_than_the_rank():
    report = swap_(Model(), r=7)
    assert [row.module.rpartition(".")[2] for row in report.rows] == ["q_proj", "q_proj"]
    assert "2 layers are smaller than r = 7 and got no pair: layers.0.v_proj" in str(report)
