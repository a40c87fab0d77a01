"""`save_adapter` and `load_adapter`: what comes back, and what a crash leaves."""

import fcntl
import json
import os

import peft
import pytest
import torch
from torch import nn
from trained_adapters import base, output, train, trained

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError


def changes(t):
    return 0.5 if t < 3 else 1.0 if t < 6 else 0.25


@pytest.mark.parametrize("ratio_at", [lambda t: 0.5, changes], ids=["constant", "changing"])
@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_round_trip_on_a_fresh_base_model(tmp_path, w_update, ratio_at):
    model, optimizer = trained(w_update, ratio_at=ratio_at)
    save_adapter(model, tmp_path)
    fresh = base()
    w0 = fresh[0].weight.detach().clone()
    report = load_adapter(fresh, tmp_path)
    assert len(report.rows) == 1 and torch.equal(fresh[0].weight, w0)
    torch.testing.assert_close(output(fresh), output(model), atol=1e-12, rtol=0)
    again = base()
    swap_(again, r=3, target_modules=["0"])
    load_adapter(again, tmp_path)
    torch.testing.assert_close(output(again), output(model), atol=1e-12, rtol=0)
    merge_(fresh)
    torch.testing.assert_close(output(fresh), output(model), atol=1e-12, rtol=0)


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_adapter_and_optimizer_state_resume_the_run(tmp_path, w_update):
    model, optimizer = trained(w_update, ratio_at=changes)
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    second = DeltaLoRA(fresh, lr=1e-2, update_ratio=0.25, w_update=w_update)
    second.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(output(fresh), output(model), atol=1e-12, rtol=0)
    train(model, optimizer, 8, ratio_at=lambda t: 0.25)
    train(fresh, second, 8, ratio_at=lambda t: 0.25)
    torch.testing.assert_close(output(fresh), output(model), atol=1e-12, rtol=0)
    save_adapter(fresh, tmp_path)  # what it saves again is complete
    third = base()
    load_adapter(third, tmp_path)
    torch.testing.assert_close(output(third), output(model), atol=1e-12, rtol=0)


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_training_goes_on_from_a_loaded_adapter(tmp_path, w_update):
    model, _ = trained()
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    optimizer = DeltaLoRA(fresh, lr=1e-9, weight_decay=0, update_ratio=1.0, w_update=w_update)
    train(fresh, optimizer, 4, ratio_at=lambda t: 1.0)
    torch.testing.assert_close(output(fresh), output(model), atol=1e-6, rtol=0)
    save_adapter(fresh, tmp_path)
    again = base()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(output(again), output(fresh), atol=1e-12, rtol=0)


def test_bfloat16_in_place_loads_within_rounding(tmp_path):
    model, _ = trained(dtype=torch.bfloat16)
    save_adapter(model, tmp_path)
    fresh = base(torch.bfloat16)
    load_adapter(fresh, tmp_path)
    error = (output(fresh) - output(model)).norm() / output(model).norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def test_adapter_is_adapter_sized_and_holds_no_base_weight(tmp_path):
    model = nn.Sequential(nn.Linear(512, 512))
    swap_(model, r=2)
    optimizer = DeltaLoRA(model, update_ratio=1.0)
    for _ in range(3):
        model(torch.randn(2, 512)).sum().backward()
        optimizer.step()
    save_adapter(model, tmp_path)
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size < 4 * (2 * 2 * 1024) + 4096 < 512 * 512 * 4


def test_saving_replaces_and_leaves_no_other_file(tmp_path):
    model, optimizer = trained()
    save_adapter(model, tmp_path)
    first = {f.name for f in tmp_path.iterdir()}
    train(model, optimizer, 2)
    save_adapter(model, tmp_path)
    second = {f.name for f in tmp_path.iterdir()}
    assert len(first) == len(second) == 2 and first != second


def test_saving_leaves_files_of_others(tmp_path):
    model, optimizer = trained()
    save_adapter(model, tmp_path)
    (tmp_path / "adapter-best.safetensors").write_bytes(b"a user's own copy")
    (tmp_path / f"adapter-{'0' * 16}.safetensors").write_bytes(b"no weights of this name")
    (tmp_path / f"adapter-{'1' * 16}.safetensors").mkdir()
    train(model, optimizer, 2)
    config = save_adapter(model, tmp_path)
    mine = {config, tmp_path / json.loads(config.read_text())["weights"]}
    assert {f.name for f in tmp_path.iterdir() if f not in mine} == {
        "adapter-best.safetensors", f"adapter-{'0' * 16}.safetensors",
        f"adapter-{'1' * 16}.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", ['{"peft_type": "LORA"}', "[]", "", "not JSON", "[" * 100_000, "9" * 5000, None]
)
def test_another_programs_adapter_json_stays(tmp_path, content):
    path = tmp_path / "adapter.json"
    path.mkdir() if content is None else path.write_text(content)
    model, _ = trained()
    with pytest.raises(ArgumentError, match="^folder: got .*which holds an adapter.json that"):
        save_adapter(model, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["adapter.json"]
    assert content is None or path.read_text() == content


def test_an_adapter_of_any_version_is_replaced(tmp_path):
    model, _ = trained()
    (tmp_path / "adapter.json").write_text('{"format": "deltadiff-adapter", "version": 99}')
    save_adapter(model, tmp_path)
    load_adapter(base(), tmp_path)


def test_leftovers_of_killed_calls_are_removed(tmp_path):
    sha = "0123456789abcdef"
    old = [".adapter.json.k3x_9abc", f".adapter-{sha}.safetensors.abcdefgh"]
    kept = [".adapter.json.swp", ".adapter-notes.abcdefgh", ".adapter.json.12345678"]
    for name in old + kept:
        (tmp_path / name).write_text("")
    model, _ = trained()
    with (tmp_path / kept[-1]).open() as file:  # as a process does that is writing it
        fcntl.flock(file, fcntl.LOCK_EX)
        save_adapter(model, tmp_path)
    assert sorted(f.name for f in tmp_path.glob(".*")) == sorted(kept)


@pytest.mark.parametrize("folder", ["", None, 3, b"folder"])
def test_what_is_no_folder_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = trained()
    before = output(model)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ArgumentError, match="^folder: got"):
            call(model, folder)
    assert not any(tmp_path.iterdir()) and torch.equal(output(model), before)


def test_a_crash_while_saving_leaves_the_old_adapter(tmp_path, monkeypatch):
    model, optimizer = trained()
    save_adapter(model, tmp_path)
    before = output(model)
    train(model, optimizer, 2)
    real, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) == 2:  # the weights are there, the JSON is not
            raise OSError("no space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, tmp_path)
    monkeypatch.undo()
    fresh = base()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(output(fresh), before, atol=1e-12, rtol=0)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_too_many_update_ratios_cannot_be_saved_as_factors(tmp_path):
    model, _ = trained(ratio_at=lambda t: 0.5)
    model[0].delta.past_updates = None
    with pytest.raises(SwapError, match="merge_"):
        save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_peft_model_is_refused(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=16, target_modules=["0"], modules_to_save=["2"])
    model = peft.get_peft_model(base(), config)
    swap_(model)
    with pytest.raises(SwapError, match="for PEFT's layers, `model.save_pretrained`"):
        save_adapter(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_differently_swapped_or_updated_models_are_refused(tmp_path):
    model, _ = trained()
    save_adapter(model, tmp_path)
    other = base()
    swap_(other, r=2, target_modules=["0"])
    with pytest.raises(SwapError, match="0: got rank 2"):
        load_adapter(other, tmp_path)
    with pytest.raises(SwapError, match="already updated in place"):
        load_adapter(model, tmp_path)
