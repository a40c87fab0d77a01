"""Shared pairs and selections in adapter files, and models that are merged or un-swapped."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from shared_pairs import blocks, select, train
from small_models import build, loss_of

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_, swap_report, unswap_
from deltadiff.diffora import Search, apply_, find_candidates, random_selection, selection_of
from deltadiff.errors import ArgumentError, CheckpointError, SwapError
from deltadiff.layers.adapter_files.format import sha256_of_json
from deltadiff.layers.lora_layers import lora_layers


def test_merge_and_unswap_with_shared_pairs():
    model = build("gpt2").double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    apply_(model, selection, seed=0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.0))
    loss = loss_of(model, range(8)).item()
    merged = copy.deepcopy(model)
    merge_(merged)
    assert loss_of(merged, range(8)).item() == pytest.approx(loss, abs=1e-12)
    assert selection_of(merged) is None and not lora_layers(merged)
    unswap_(model)
    assert selection_of(model) is None
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_an_adapter_restores_pairs_sharing_selection_and_gates(tmp_path, name, w_update):
    model = build(name).double()
    search = Search(model, r=2, seed=0)
    selection = search.gates().discretise(0.5)
    search.close()
    apply_(model, selection, r=3, share_r=2, seed=0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update))
    loss = loss_of(model, range(8)).item()
    config = json.loads(save_adapter(model, tmp_path).read_text())
    stored = load_file(tmp_path / config["weights"])
    own = [n for n in stored if n.endswith("lora_A")]
    assert len(own) == len({layer.lora_A for layer in lora_layers(model).values()})
    assert len(own) < len(lora_layers(model))

    fresh = build(name).double()
    report = load_adapter(fresh, tmp_path)
    assert loss_of(fresh, range(8)).item() == pytest.approx(loss, abs=1e-12)
    assert [r.shares for r in report.rows] == [r.shares for r in swap_report(model).rows]
    assert report.trainable == swap_report(model).trainable
    assert selection_of(fresh) == selection and selection_of(fresh).gates == search.gates()
    load_adapter(fresh, tmp_path)  # once more, into the model that is swapped now
    assert loss_of(fresh, range(8)).item() == pytest.approx(loss, abs=1e-12)
    layers, theirs = lora_layers(fresh), lora_layers(model)
    for a in layers:
        for b in layers:
            same = theirs[a].lora_A is theirs[b].lora_A
            assert (layers[a].lora_A is layers[b].lora_A) == same


def test_training_goes_on_after_loading_as_without(tmp_path):
    def fresh():
        model = build("bert").double()
        apply_(model, random_selection(find_candidates(model), 0.5, seed=1), seed=0)
        return model

    model = fresh()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    train(model, optimizer, 3)
    save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    again = build("bert").double()
    load_adapter(again, tmp_path)
    optimizer = DeltaLoRA(again, lr=1e-2, update_ratio=0.5, w_update="factored")
    optimizer.load_state_dict(state)
    train(again, optimizer, 3)
    for (n, p), q in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert n == q[0] and torch.equal(p, q[1]), n


def test_adapters_that_share_otherwise_do_not_fit(tmp_path):
    model = blocks("ab", "ab")
    apply_(model, select(model, "layers.0.a", "layers.1.a"), r=2, share_r=2)
    path = save_adapter(model, tmp_path)
    other = blocks("ab", "ab")
    swap_(other, r=2)
    with pytest.raises(SwapError, match=r"layers.1.b: got the pair of layers.1.b.*layers.0.b"):
        load_adapter(other, tmp_path)
    config = json.loads(path.read_text())
    config["layers"]["layers.1.b"]["pair_of"] = "layers.7.b"
    del config["checksum"]
    path.write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))
    with pytest.raises(CheckpointError, match=r"layers.1.b with the pair of layers.7.b"):
        load_adapter(blocks("ab", "ab"), tmp_path)


def test_a_garbled_selection_is_refused_when_it_is_asked_for(tmp_path):
    model = blocks("ab", "ab")
    apply_(model, select(model, "layers.0.a", "layers.1.a"))
    path = save_adapter(model, tmp_path)
    config = json.loads(path.read_text())
    config["selection"]["layers"]["layers.0"]["a"] = "yes"
    del config["checksum"]
    path.write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))
    fresh = blocks("ab", "ab")
    load_adapter(fresh, tmp_path)
    with pytest.raises(ArgumentError, match=r"layers.0.a: got 'yes'; accepted: bool"):
        selection_of(fresh)


def test_a_selection_is_saved_as_its_own_file_would_be(tmp_path):
    model = build("bert")
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    apply_(model, selection)
    config = json.loads(save_adapter(model, tmp_path / "adapter").read_text())
    selection.save(tmp_path / "selection.json")
    assert config["selection"] == json.loads((tmp_path / "selection.json").read_text())
