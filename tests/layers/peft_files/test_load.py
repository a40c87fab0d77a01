"""`load_adapter` on folders that PEFT wrote: the same model, with layers of deltadiff."""

import copy

import peft
import pytest
import torch
from small_models import build
from tolerance import assert_close_to_truth
from torch import nn
from two_blocks import Model, peft_model

from deltadiff import export_peft, load_adapter, merge_, save_adapter, swap_, unswap_
from deltadiff.errors import ArgumentError, CheckpointError, SwapError
from deltadiff.layers.lora_layers import lora_layers

IDS = torch.arange(3, 17).view(2, 7)


def trained_by_peft(base: nn.Module, folder, **options) -> nn.Module:
    """A model of PEFT whose adapter differs from the start in everything; saved in ``folder``."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
            elif p.requires_grad:
                p.add_(0.2)
    model.save_pretrained(folder)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


SOURCES = {
    "plain": ("llama", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"}),
    "rslora": ("llama", {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 4, r"layers\.1\..*q_proj": 3},
            "alpha_pattern": {"^model.layers.2.self_attn.q_proj": 7, "up_proj": 2},
        },
    ),
    "patterns_rslora": (
        "llama",
        {
            "r": 2, "use_rslora": True, "target_modules": ["q_proj"],
            "rank_pattern": {"1.*q_proj": 3},
        },
    ),
    "conv1d": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "head": ("bert", {"r": 2, "target_modules": ["value"], "task_type": "SEQ_CLS"}),
    "biases": ("bert", {"r": 2, "target_modules": ["value"], "bias": "all"}),
    "own_biases": ("bert", {"r": 2, "target_modules": ["value"], "bias": "lora_only"}),
    "orthogonal": (
        "llama", {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_an_adapter_of_peft_gives_the_same_model(source, tmp_path):
    name, options = SOURCES[source]
    base = build(name)
    eager = trained_by_peft(base, tmp_path, **options)
    model = copy.deepcopy(base)
    report = load_adapter(model, tmp_path)
    truth = logits(copy.deepcopy(eager).double())
    assert (logits(base) - truth).norm() > 1e-3 * truth.norm()
    assert_close_to_truth(logits(model), logits(eager), truth, 2)
    pairs = [n for n, _ in eager.named_modules() if n.endswith("lora_A.default")]
    assert len(report.rows) == len(pairs)
    assert report.trainable == sum(p.numel() for p in eager.parameters() if p.requires_grad)
    merge_(model)
    assert_close_to_truth(logits(model), logits(eager), truth, 2)


def test_layers_keep_what_the_configuration_says(tmp_path):
    base = build("llama")
    trained_by_peft(base, tmp_path, r=4, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj"])
    load_adapter(base, tmp_path)
    layer = base.model.layers[0].self_attn.q_proj
    assert (layer.r, layer.lora_alpha, layer.scaling, layer.lora_dropout) == (4, 6, 1.5, 0.1)
    assert layer.lora_A.requires_grad and not layer.weight.requires_grad


def test_a_bfloat16_base_gets_float32_pairs(tmp_path):
    base = build("llama").bfloat16()
    eager = trained_by_peft(base, tmp_path, r=2, target_modules=["q_proj"])
    load_adapter(base, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    pair = eager.base_model.model.get_submodule(name)
    assert torch.equal(base.get_submodule(name).lora_A, pair.lora_A["default"].weight)
    assert base.get_submodule(name).lora_A.dtype == torch.float32


def test_what_was_exported_comes_back(tmp_path):
    base = build("bert")
    model = copy.deepcopy(base)
    swap_(model, r=2, lora_alpha=3, modules_to_save=["classifier"], seed=0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    nn.init.normal_(model.classifier.weight)
    export_peft(model, tmp_path)
    again = copy.deepcopy(base)
    compiled = torch.compile(again)  # the wrapper changes the names
    load_adapter(compiled, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_the_adapter_of_save_adapter_comes_first(tmp_path):
    model = Model()
    swap_(model, r=3, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    swap_(other := Model(), r=2)
    export_peft(other, tmp_path)
    assert [row.r for row in load_adapter(Model(), tmp_path).rows] == [3, 3]


def test_models_that_are_not_eager_are_refused(tmp_path):
    trained_by_peft(Model(), tmp_path, r=2, target_modules=["q_proj"])
    with pytest.raises(SwapError, match="PEFT's own load_adapter"):
        load_adapter(peft_model(), tmp_path)
    model = Model()
    swap_(model, r=2)
    with pytest.raises(SwapError, match="`unswap_`"):
        load_adapter(model, tmp_path)
    unswap_(model)
    load_adapter(model, tmp_path)


def snapshot(model):
    state = {name: p.detach().clone() for name, p in model.state_dict().items()}
    return state, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("change", ["name", "shape", "kind", "head", "twice", "backend"])
def test_an_adapter_that_does_not_fit_changes_nothing(change, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["head"]}
    trained_by_peft(Model(), tmp_path, r=2, rank_pattern={"v_proj": 3}, **options)
    model, backend = Model(), None
    if change == "name":
        model.layers = nn.ModuleList([model.layers[0]])
    elif change == "shape":
        model.layers[1].v_proj = nn.Linear(8, 5, bias=False)
    elif change == "kind":
        model.layers[1].v_proj = nn.Tanh()
    elif change == "head":
        model.head = nn.Linear(6, 4)
    elif change == "twice":
        model.again = model.layers[0].q_proj
    else:
        backend = "cubist"
    before = snapshot(model)
    with pytest.raises(ArgumentError) as raised:
        load_adapter(model, tmp_path, backend=backend)
    if change in ("name", "shape", "kind", "head"):
        assert isinstance(raised.value, CheckpointError) and "another base" in str(raised.value)
    state, required = snapshot(model)
    assert required == before[1] and all(torch.equal(state[n], p) for n, p in before[0].items())
    assert not lora_layers(model)


def test_what_one_call_of_swap_refuses_takes_back_the_others(tmp_path, monkeypatch):
    from deltadiff.layers.peft_files import load as load_peft

    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}}
    trained_by_peft(Model(), tmp_path, r=2, **options)
    real = load_peft.swap_

    def swap(model, *, r, **more):
        if r == 3:
            raise ArgumentError("r", r, "a layer that can be swapped")
        return real(model, r=r, **more)

    monkeypatch.setattr(load_peft, "swap_", swap)
    model = Model()
    with pytest.raises(ArgumentError, match="that can be swapped"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_tied_weights_that_the_adapter_unties_are_refused(tmp_path):
    llama = build("llama")
    llama.config.tie_word_embeddings = True
    base = type(llama)(llama.config).eval()
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        trained_by_peft(base, tmp_path / "untied", **options)
    with pytest.raises(CheckpointError, match="to which it is tied in this model"):
        load_adapter(base, tmp_path / "untied")
    eager = trained_by_peft(base, tmp_path / "tied", ensure_weight_tying=True, **options)
    load_adapter(base, tmp_path / "tied")
    torch.testing.assert_close(logits(base), logits(eager))
