"""Adapters that somebody forged: whatever they hold, they load or raise a typed error.

The forger writes right checksums, so what is tested is how entries and tensors are checked. (See
test_adapter_file_damage.py for files that were damaged.) A refused adapter changes nothing.
"""

import hashlib
import json
import random
import shutil
from collections import OrderedDict

import pytest
import torch
from model_state import model_state
from mutants import Mutants, mutate_json, mutate_tensors
from safetensors.torch import load, save
from torch import nn
from version_1_adapters import save_version_1

from deltadiff import DeltaLoRA, diffora, load_adapter, merge_, save_adapter, swap_
from deltadiff.layers.adapter_files.format import sha256_of_json, weights_name

CASES = 40  # for each seed


def base() -> nn.Sequential:
    torch.manual_seed(0)
    parts = {"up": nn.Linear(6, 6), "down": nn.Linear(6, 6)}
    return nn.Sequential(OrderedDict(parts, norm=nn.BatchNorm1d(6), head=nn.Linear(6, 4)))


def stack() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)})


def trained() -> nn.Module:
    """Delta-LoRA with a past lambda, a new head, and buffers beside trained parameters."""
    model = base()
    swap_(model, r=2, target_modules=["up", "down"], modules_to_save=["norm", "head"], seed=0)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=0)
    for ratio in (0.5, 0.5, 0.25, 0.25):
        optimizer.param_groups[0]["update_ratio"] = ratio
        optimizer.zero_grad()
        model(torch.eye(6)).square().mean().backward()
        optimizer.step()
    return model


def shared() -> nn.Module:
    """DiffoRA's selection, with a pair that layers share."""
    model = stack()
    selection = diffora.random_selection(diffora.find_candidates(model), 0.5)
    diffora.apply_(model, selection, r=2, share_r=1)
    return model


def gated() -> nn.Module:
    model = base()
    swap_(model, r=2, target_modules=["up", "down"], seed=0)
    model.up.gate, model.down.gate = nn.Parameter(torch.ones(2)), torch.tensor(0.5)
    return model


KINDS = {
    "trained": (trained, save_adapter, base),
    "shared": (shared, save_adapter, stack),
    "gated": (gated, save_adapter, base),
    "version 1": (trained, save_version_1, base),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict:
    """Of each kind: the folder of a right adapter, and the function that makes its base."""
    found = {}
    for kind, (make, write, fresh) in KINDS.items():
        folder = tmp_path_factory.mktemp("adapter")
        write(make(), folder)
        load_adapter(fresh(), folder)
        found[kind] = folder, fresh
    return found


def forge(folder, random_: random.Random) -> str:
    """Change what an adapter says, with right checksums; returns the changed JSON."""
    path = folder / "adapter.json"
    config = json.loads(path.read_text())
    del config["checksum"]
    blob = (folder / config["weights"]).read_bytes()
    if random_.random() < 0.4:
        blob = save(mutate_tensors(load(blob), random_))
        digest = hashlib.sha256(blob).hexdigest()
        config |= {"weights": weights_name(digest), "sha256": digest}
        (folder / config["weights"]).write_bytes(blob)
    if random_.random() < 0.8:
        config = mutate_json(config, random_)
    if isinstance(config, dict):
        config["checksum"] = sha256_of_json(config)
    path.write_text(json.dumps(config))
    return path.read_text()


def works(model: nn.Module) -> bool:
    """Whether all linear layers give an output outside of training, where dropout is allowed."""
    layers = [m for m in model.eval().modules() if isinstance(m, nn.Linear)]
    return all(layer(torch.ones(2, 6)).shape[0] == 2 for layer in layers)


@pytest.mark.check(short=2, long=50)
def test_forged_adapters(seed, adapters, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    for number in range(CASES):
        kind = random_.choice(list(adapters))
        right, fresh = adapters[kind]
        folder = tmp_path / str(number)
        shutil.copytree(right, folder)
        case = f"{kind}, case {number}: {forge(folder, random_):.300}"
        model = fresh()
        before = model_state(model)
        if mutants.attempt(case, lambda m=model, f=folder: load_adapter(m, f)):
            mutants.check(case, works(model), "it loads, and cannot be used")
            save_adapter(model, folder / "again")
            merge_(model)
        else:
            mutants.check(case, model_state(model) == before, "the model was changed")
    mutants.conclude(tally, "forged adapters")
