"""Adapters whose checksums are right but whose entries nobody's `save_adapter` wrote."""

import copy
import json
import random

import pytest
import torch
from shared_pairs import blocks, select
from torch import nn

from deltadiff import load_adapter, save_adapter, swap_
from deltadiff.diffora import apply_
from deltadiff.errors import ArgumentError, CheckpointError
from deltadiff.layers.adapter_files.format import read_adapter_config, sha256_of_json
from deltadiff.layers.lora_layers import lora_layers


def forge(folder, change):
    """Change the JSON object and give it the checksum that fits."""
    config = read_adapter_config(folder)
    change(config)
    (folder / "adapter.json").write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))


def of_layer(**entries):
    return lambda config: config["layers"]["layers.0.a"].update(entries)


FORGED = {
    "no layers": lambda c: c.update(layers={}),
    "layers": lambda c: c.update(layers=[1]),
    "layer": lambda c: c["layers"].update({"layers.0.a": 3}),
    "unknown layer": lambda c: c["layers"].update(x={"r": 1}),
    "base": lambda c: c.update(base=None),
    "base shape": lambda c: c["base"].update({"layers.0.a.weight": [6]}),
    "base size": lambda c: c["base"].update({"layers.0.a.weight": [6, -6]}),
    "saved": lambda c: c.update(saved=[[]]),
    "saved without shape": lambda c: c.update(saved=["x"]),
    "tied": lambda c: c.update(tied={"x": "y"}),
    "r": of_layer(r="2"),
    "r bool": of_layer(r=True),
    "r 0": of_layer(r=0),
    "scaling": of_layer(scaling=None),
    "scaling nan": of_layer(scaling=float("nan")),
    "scaling huge": of_layer(scaling=10**400),
    "lora_alpha": of_layer(lora_alpha=[]),
    "lora_dropout": of_layer(lora_dropout=1.0),
    "update_ratio": of_layer(update_ratio="0.5"),
    "update_ratio below 0": of_layer(update_ratio=-1.0),
    "no update_ratio": lambda c: c["layers"]["layers.0.a"].pop("update_ratio"),
    "folded": of_layer(folded=2**40),
    "folded many": of_layer(folded=2**30),
    "folded float": of_layer(folded=0.5),
    "pair_of": of_layer(pair_of=4),
    "pair_of unknown": of_layer(pair_of="x"),
    "share_group": of_layer(share_group={}),
    "gate": of_layer(gate=True),
    "gate shape": of_layer(gate={"shape": [3], "trained": False}),
    "gate of another rank": of_layer(gate={"shape": [3, 3], "trained": True}),
    "gate not square": of_layer(gate={"shape": [2, 3], "trained": True}),
    "gate of a single entry": of_layer(gate={"shape": [1, 1], "trained": True}),
    "gate of three dimensions": of_layer(gate={"shape": [2, 2, 2], "trained": True}),
    "gate trained": of_layer(gate={"shape": [2], "trained": "no"}),
    "selection": lambda c: c.update(selection=[]),
}


def saved(folder):
    model = blocks("ab", "ab")
    apply_(model, select(model, "layers.0.a", "layers.1.a"), r=2, share_r=2)
    save_adapter(model, folder)


@pytest.mark.parametrize("forgery", FORGED)
def test_forged_entries_are_refused_before_anything_is_changed(tmp_path, forgery):
    saved(tmp_path)
    forge(tmp_path, FORGED[forgery])
    fresh = blocks("ab", "ab")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_adapter(fresh, tmp_path)
    assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_a_rank_that_the_base_cannot_have_changes_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    swap_(model, r=2)
    with torch.no_grad():  # a pair of rank 9 on a layer of 8 x 8
        model[1].r, model[1].lora_A = 9, nn.Parameter(torch.ones(9, 8))
        model[1].lora_B = nn.Parameter(torch.ones(8, 9))
    save_adapter(model, tmp_path)
    fresh = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ArgumentError, match="r: got 9"):
        load_adapter(fresh, tmp_path)
    assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


VALUES = [None, True, -1, 0, 1, 2, 2**40, 0.5, -1.0, 1e300, "", "x", [], [1], [2, 2], {}, {"a": 1}]


def mutate(value, random_):
    """Replace, remove or add something somewhere in a JSON value."""
    inner = isinstance(value, (dict, list)) and value and random_.random() < 0.8
    if not inner:
        return copy.deepcopy(random_.choice(VALUES))
    key = random_.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if random_.random() < 0.15:
        del value[key]
    else:
        value[key] = mutate(value[key], random_)
    return value


@pytest.mark.check(short=20, long=1000)
def test_any_forgery_is_refused_or_loads(seed, tmp_path):
    random_ = random.Random(seed)
    saved(tmp_path)
    version = random_.choice([1, 2])

    def change(config):
        config["version"] = version
        for name in ("format", "weights", "sha256", "version"):
            config[name] = config.pop(name)
        part = random_.choice(["base", "layers", "layers", "saved", "selection"])
        config[part] = mutate(config[part], random_)

    forge(tmp_path, change)
    fresh = blocks("ab", "ab")
    try:
        load_adapter(fresh, tmp_path)
    except ArgumentError:
        assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())
    else:
        fresh(torch.ones(2, 6))
