"""Folders of PEFT with files of any content load, or are refused and change nothing."""

import random
import shutil

import peft
import pytest
import torch
from model_state import model_state
from mutants import Mutants, mutate_json_file, mutate_safetensors, mutate_tensors, spoil
from safetensors.torch import load, save
from two_blocks import Model

from deltadiff import load_adapter, merge_

CASES = 40  # for each seed
OPTIONS = {
    "plain": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["head"]},
    "patterns": {
        "r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"v_proj": 1.5}, "use_rslora": True, "bias": "lora_only",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list:
    found = []
    for options in OPTIONS.values():
        folder = tmp_path_factory.mktemp("peft")
        peft.get_peft_model(Model(), peft.LoraConfig(**options)).save_pretrained(folder)
        load_adapter(Model(), folder)
        found.append(folder)
    return found


def forge(folder, random_: random.Random) -> str:
    """Change one of the two files; returns what was done."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    how = random_.choices(("config", "bytes", "tensors", "spoil"), (8, 4, 5, 1))[0]
    if how == "config":
        config.write_bytes(mutate_json_file(config.read_bytes(), random_))
        return f"{config.read_bytes()[:300]!r}"
    if how == "spoil":
        return spoil(random_.choice([config, weights]), random_)
    blob = weights.read_bytes()
    if how == "bytes":
        weights.write_bytes(mutate_safetensors(blob, random_))
    else:
        weights.write_bytes(save(mutate_tensors(load(blob), random_)))
    return how


@pytest.mark.check(short=2, long=40)
def test_folders_of_peft(seed, folders, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        folder = tmp_path / str(number)
        shutil.copytree(random_.choice(folders), folder)
        case = f"case {number}: {forge(folder, random_)}"
        model = Model()
        before = model_state(model)
        if mutants.attempt(case, lambda m=model, f=folder: load_adapter(m, f)):
            for name, module in model.named_modules():
                if name.endswith(("q_proj", "v_proj")):
                    module(torch.ones(2, module.in_features))
            merge_(model)
        else:
            mutants.check(case, model_state(model) == before, "the model was changed")
    mutants.conclude(tally, "folders of PEFT")
