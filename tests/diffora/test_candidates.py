"""DiffoRA's candidates: what is found in real architectures and in stacks of blocks."""

import pytest
from small_models import ARCHITECTURES, TYPES, Block, Stack, build
from torch import nn

from deltadiff import swap_
from deltadiff.diffora import find_candidates
from deltadiff.errors import ArgumentError, ArgumentTypeError

HEADS = {
    "bert": {"bert.pooler.dense", "classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "deberta": {"pooler.dense", "classifier"},
    "gpt2": set(),
    "llama": set(),
    "qwen": set(),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_candidates_of_real_architectures(name):
    model = build(name)
    candidates = find_candidates(model)
    assert len(candidates.layers) == 3 and candidates.types == TYPES[name]
    assert candidates.modules == (TYPES[name],) * 3
    modules = dict(model.named_modules())
    for whole, (i, j) in candidates.places.items():
        assert whole == f"{candidates.layers[i]}.{candidates.types[j]}" and whole in modules
    assert set(candidates.outside) == HEADS[name]


def test_each_layer_has_its_own_modules():
    model = Stack(Block("ab"), Block("bca"))
    candidates = find_candidates(model)
    assert candidates.layers == ("layers.0", "layers.1")
    assert candidates.modules == (("a", "b"), ("b", "c", "a"))
    assert candidates.types == ("a", "b", "c")
    assert candidates.places["layers.1.c"] == (1, 2)


def test_an_outermost_stack_is_the_stack():
    inner = Stack(Block("ab"), Block("ab"))
    candidates = find_candidates(Stack(inner))
    assert candidates.layers == ("layers.0",) and candidates.types[0] == "layers.0.a"


def test_targets_narrow_the_candidates():
    candidates = find_candidates(build("bert"), ["query", "value"])
    assert candidates.types == ("attention.self.query", "attention.self.value")
    kept = find_candidates(build("bert"), modules_to_save=["classifier"])
    assert kept.outside == ("bert.pooler.dense",)


def test_a_module_in_two_layers_is_one_candidate():
    first, second = Block("abc"), Block("abc")
    second.a = first.a
    assert find_candidates(Stack(first, second)).modules == (("a", "b", "c"), ("b", "c"))


@pytest.mark.parametrize(
    ("model", "targets", "words"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "all-linear", "nn.ModuleList"),
        (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "all-linear", "nn.ModuleList"),
        (Stack(Block("ab"), Block("ab")), ["a"], "one module in layers.0: a"),
        (Stack(Block("ab"), Block("c")), "all-linear", "one module in layers.1: c"),
        (Stack(Block("ab")), ["query"], "query"),
        (nn.LayerNorm(3), "all-linear", "matches no linear layer"),
        ("bert", "all-linear", "torch.nn.Module"),
    ],
)
def test_no_candidates(model, targets, words):
    with pytest.raises(ArgumentError, match=words):
        find_candidates(model, targets)


def test_peft_layers_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ArgumentTypeError, match="PEFT"):
        find_candidates(model)


def test_a_swapped_model_has_no_candidates_left():
    model = Stack(Block("ab"))
    swap_(model, r=2)
    with pytest.raises(ArgumentError, match="target_modules"):
        find_candidates(model)
