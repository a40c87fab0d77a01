"""Adapter files that are damaged, foreign, or made for another base model."""

import json

import pytest
import torch
from torch import nn
from trained_adapters import base, output, trained

from deltadiff import load_adapter, save_adapter
from deltadiff.errors import CheckpointError
from deltadiff.layers.adapter_files.format import read_adapter_config, sha256_of_json
from deltadiff.layers.lora_layers import lora_layers


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


def edit(folder, change):
    path = folder / "adapter.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def truncate(folder):
    data = weights_file(folder).read_bytes()
    weights_file(folder).write_bytes(data[: len(data) // 2])


def garble(folder):
    data = bytearray(weights_file(folder).read_bytes())
    data[-1] ^= 1
    weights_file(folder).write_bytes(data)


def swap_weights(folder):
    """Save an adapter whose JSON is intact but does not fit its tensors."""
    model, _ = trained()
    model[0].r = 2
    save_adapter(model, folder)


DAMAGE = {
    "no folder": lambda f: [p.unlink() for p in list(f.iterdir())],
    "no weights": lambda f: weights_file(f).unlink(),
    "truncated weights": truncate,
    "one bit flipped": garble,
    "truncated json": lambda f: (f / "adapter.json").write_text('{"format": "delta'),
    "json list": lambda f: (f / "adapter.json").write_text("[]"),
    "binary json": lambda f: (f / "adapter.json").write_bytes(b"\xff\xfe\x00"),
    "foreign": lambda f: (f / "adapter.json").write_text('{"peft_type": "LORA"}'),
    "newer version": lambda f: edit(f, lambda c: c.update(version=99)),
    "missing key": lambda f: edit(f, lambda c: c.pop("layers")),
    "path outside": lambda f: edit(f, lambda c: c.update(weights="../x.safetensors")),
    "edited scaling": lambda f: edit(f, lambda c: c["layers"]["0"].update(scaling=9.0)),
    "edited base": lambda f: edit(f, lambda c: c["base"].update(x=[1])),
    "tensors of another adapter": swap_weights,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_refused_and_nothing_changes(tmp_path, damage):
    model, _ = trained()
    save_adapter(model, tmp_path)
    DAMAGE[damage](tmp_path)
    fresh = base()
    before = output(fresh)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(fresh, tmp_path)
    assert str(tmp_path) in str(caught.value) and "accepted" in str(caught.value)
    assert not lora_layers(fresh) and torch.equal(output(fresh), before)


def test_adapter_for_another_base_model_is_refused(tmp_path):
    model, _ = trained()
    save_adapter(model, tmp_path)
    other = nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Linear(21, 4)).double()
    with pytest.raises(CheckpointError, match=r"another base model: 0.bias is \[20\] there"):
        load_adapter(other, tmp_path)
    assert not lora_layers(other)


def rewrite(folder, change):
    """Change the JSON object and give it the checksum that fits."""
    config = read_adapter_config(folder)
    change(config)
    (folder / "adapter.json").write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))


def test_the_config_of_an_adapter_tells_what_was_trained_beside_it(tmp_path):
    model, _ = trained()
    save_adapter(model, tmp_path)
    config = read_adapter_config(tmp_path)
    assert config["saved"] == ["2.bias", "2.weight"] and set(config["layers"]) == {"0"}
    assert [config["base"][name] for name in config["saved"]] == [[4], [4, 20]]
    assert "selection" not in config
    weights_file(tmp_path).unlink()
    assert read_adapter_config(str(tmp_path)) == config  # reads no tensors


@pytest.mark.parametrize("selection", [["0"], "0", 1, True])
def test_a_selection_that_is_no_object_is_refused(tmp_path, selection):
    model, _ = trained()
    save_adapter(model, tmp_path)
    rewrite(tmp_path, lambda config: config.update(selection=selection))
    fresh = base()
    with pytest.raises(CheckpointError, match=r"selection in .*adapter\.json: got "):
        load_adapter(fresh, tmp_path)
    assert not lora_layers(fresh)
