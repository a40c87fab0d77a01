"""A model with shared pairs in the files of transformers and of torch's distributed checkpoints."""

import copy

import peft
import pytest
from safetensors.torch import load_file
from shared_pairs import train
from small_models import build, loss_of
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from deltadiff import DeltaLoRA
from deltadiff.diffora import Search, apply_, find_candidates, random_selection
from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.lora_layers import lora_layers


def applied(name, seed=0):
    model = build(name, seed)
    apply_(model, random_selection(find_candidates(model), 0.5, seed=1), seed=seed)
    return model


def trained(name):
    model = applied(name)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.0), 2)
    return model


def owners(model):
    """For each layer the first one with the same pair."""
    layers = list(lora_layers(model).values())
    return [[other.lora_A is layer.lora_A for other in layers].index(True) for layer in layers]


def check_equal(model, other):
    assert loss_of(other, range(8)) == loss_of(model, range(8))
    assert owners(model) == owners(other) != list(range(len(owners(model))))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_save_pretrained(name, tmp_path):
    model = trained(name)
    model.save_pretrained(tmp_path)
    other = applied(name, seed=1)
    stored = load_file(tmp_path / "model.safetensors")
    missing = other.load_state_dict(stored, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])  # which is tied
    check_equal(model, other)


def test_the_first_layer_of_a_group_holds_its_pair():
    model = applied("bert")
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    for name, layer in lora_layers(model).items():
        assert (layer.pair_owner is None) == (f"{name}.lora_A" in state)
        if layer.share_group is not None:
            found.setdefault(layer.share_group, []).append(name)
    for names in found.values():
        assert [f"{name}.lora_B" in state for name in names] == [True] + [False] * (len(names) - 1)


def test_distributed_checkpoints():
    model, other = trained("bert"), applied("bert", seed=1)
    set_model_state_dict(other, copy.deepcopy(get_model_state_dict(model)))
    check_equal(model, other)


@pytest.mark.parametrize("call", [apply_, lambda model, _: Search(model)])
def test_peft_models_are_refused(call):
    selection = random_selection(find_candidates(build("bert")), 0.5)
    model = peft.get_peft_model(build("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    accepted = "`swap_` that, and `deltadiff.export_peft` the result"
    with pytest.raises(ArgumentTypeError, match=f"which DiffoRA cannot train.*{accepted}"):
        call(model, selection)
