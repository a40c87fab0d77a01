"""`read_peft`: which adapters of PEFT are refused, and in which words; and damaged files."""

import json
import random

import peft
import pytest
import torch
from damaged_files import damage
from safetensors.torch import load_file, save_file
from small_models import build
from two_blocks import Model

from deltadiff import load_adapter
from deltadiff.errors import CheckpointError
from deltadiff.layers.lora_layers import lora_layers

TARGETS = {"r": 2, "target_modules": ["q_proj"]}
REFUSED = {
    "use_dora": peft.LoraConfig(**TARGETS, use_dora=True),
    "lora_bias": peft.LoraConfig(**TARGETS, lora_bias=True),
    "init_lora_weights": peft.LoraConfig(**TARGETS, init_lora_weights="pissa"),
    "trainable_token_indices": peft.LoraConfig(**TARGETS, trainable_token_indices=[3]),
    "target_parameters": peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["q_proj.weight"]
    ),
    "alora_invocation_tokens": peft.LoraConfig(
        **TARGETS, alora_invocation_tokens=[1], task_type="CAUSAL_LM"
    ),
    "embed_tokens": peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
    "peft_type": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@pytest.mark.parametrize("entry", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_more_than_lora_is_refused_by_name(entry, tmp_path):
    peft.get_peft_model(build("llama"), REFUSED[entry]).save_pretrained(tmp_path)
    model = build("llama")
    with pytest.raises(CheckpointError, match=f"{entry}.*PeftModel.from_pretrained, then swap_"):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.fixture
def folder(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"])
    peft.get_peft_model(Model(), config).save_pretrained(tmp_path)
    return tmp_path


ENTRIES = [
    ("r", 3, "lora_A and lora_B of layers.0.q_proj with shapes"),
    ("r", 0, "a rank >= 1"),
    ("r", 2.0, "a rank >= 1"),
    ("r", True, "a rank >= 1"),
    ("lora_alpha", None, "a number"),
    ("lora_alpha", float("nan"), "a number"),
    ("lora_alpha", 10**400, "a number"),
    ("lora_dropout", 1, "a probability"),
    ("lora_dropout", "0.1", "a probability"),
    ("bias", "some", "plain LoRA"),
    ("use_rslora", "no", "true or false"),
    ("rank_pattern", [], None),
    ("rank_pattern", ["q_proj"], "a value for each pattern"),
    ("rank_pattern", {"q_proj": 3}, "two of rank 3"),
    ("rank_pattern", {"(": 2}, "regular expressions in rank_pattern"),
    ("alpha_pattern", {"q_proj": "x"}, "a value for each pattern"),
    ("peft_type", "VERA", "plain LoRA"),
    ("something_new", {"a": 1}, "plain LoRA"),
    ("something_new", None, None),
]


@pytest.mark.parametrize(("entry", "value", "words"), ENTRIES)
def test_entries_of_the_configuration(entry, value, words, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    model = Model()
    if words is None:
        load_adapter(model, folder)
        return
    with pytest.raises(CheckpointError) as raised:
        load_adapter(model, folder)
    assert words in str(raised.value) and str(folder) in str(raised.value)
    assert not lora_layers(model)


def test_a_pickle_is_refused_in_words(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which may run code"):
        load_adapter(Model(), folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        load_adapter(Model(), folder)


def test_tensors_that_do_not_belong_together(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = (f"base_model.model.layers.0.q_proj.lora_{k}.weight" for k in "AB")
    for changed in (
        {k: t for k, t in tensors.items() if k != b},
        tensors | {a: tensors[a][0]},
        tensors | {a: tensors[a].int()},
        tensors | {"base_model.model.layers.0.q_proj.lora_magnitude_vector": torch.ones(8)},
        tensors | {"base_model.model.layers.0.q_proj.base_layer.weight": torch.ones(8, 8)},
        {k: t for k, t in tensors.items() if "lora" not in k},
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError):
            load_adapter(Model(), folder)


@pytest.mark.check(short=20, long=1000)
def test_any_damage_is_refused_or_loads(seed, folder):
    """PEFT's files have no checksum, so a changed number is read as it is."""
    random_ = random.Random(seed)
    path = random_.choice(sorted(p for p in folder.iterdir() if p.name.startswith("adapter_")))
    path.write_bytes(damage(path.read_bytes(), random_))
    model = Model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    try:
        load_adapter(model, folder)
    except CheckpointError:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], p) for name, p in before.items())
        assert all(p.requires_grad for p in model.parameters())
