"""`export_peft`: what PEFT computes with the adapter in another process, and what is written."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import warnings

import peft_reader
import pytest
import torch
from exported_models import CASES, IDS, in_dtype
from safetensors.torch import load_file, save_file
from threads import single_thread
from tolerance import assert_close_to_truth, relative_error
from torch import nn
from two_blocks import Model

from deltadiff import DeltaLoRA, export_peft, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.lora_layers import lora_layers

ROUNDED = {"stochastic", "nearest"}  # cases whose W is not the sum of the updates


@contextlib.contextmanager
def expected_warnings(name):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in said if w.filename == __file__]
    assert [text[:5] for text in texts] == ["W of "] * (name in ROUNDED)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict:
    """The place, the case and the report of each, after one process of PEFT has read all."""
    folder, found = tmp_path_factory.mktemp("exported"), {}
    command = [sys.executable, "-I", peft_reader.__file__]  # it imports while we train
    with single_thread(), subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as reader:
        for name, make in CASES.items():
            case, place = make(), folder / name
            case.base.save_pretrained(place / "base")
            save_file({"input_ids": IDS}, place / "inputs.safetensors")
            with case.context, expected_warnings(name):
                report = export_peft(case.model, place / "adapter", **case.options)
            found[name] = place, case, report
        reader.communicate(f"{folder}\n")
    assert reader.returncode == 0
    return found


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_what_the_trained_model_does(exported, name):
    place, case, report = exported[name]
    found = load_file(place / "outputs.safetensors")
    dtype = found["own"].dtype
    with torch.no_grad():
        truth = case.truth(input_ids=IDS).logits
        untrained = in_dtype(case.base, torch.float64)(input_ids=IDS).logits
        assert (untrained - truth).norm() > 1e-3 * truth.norm()
        for key, rounded_to in (("float64", torch.float32), ("own", dtype)):
            eager = [in_dtype(case.truth, rounded_to)(input_ids=IDS).logits]
            if rounded_to == case.model.dtype:
                eager.append(unmerged(case.model)(input_ids=IDS).logits)
            # PEFT multiplies twice where the merged model does once, which rounds more often.
            worst = max(eager, key=lambda logits: relative_error(logits, truth))
            assert_close_to_truth(found[key], worst, truth, 2, rounded_to)
    assert set(report.ranks.values()) == case.ranks
    assert json.loads((place / "warnings.json").read_text()) == []


def unmerged(model: nn.Module) -> nn.Module:
    """A copy whose layers eager PyTorch computes, as a product with W and two with the pair."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        layer.backend = "reference"
    return model


def trained(**swap) -> nn.Module:
    """The two blocks, swapped, with pairs that are not at their start."""
    torch.manual_seed(0)
    model = Model()
    swap_(model, r=2, seed=0, **swap)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    return model


def entries(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_plain_lora_keeps_its_pair_and_alpha(tmp_path):
    model = trained(lora_alpha=6)
    report = export_peft(model, tmp_path)
    config, tensors = entries(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 6, {})
    for name, layer in lora_layers(model).items():
        assert torch.equal(tensors[f"base_model.model.{name}.lora_A.weight"], layer.lora_A)
        assert torch.equal(tensors[f"base_model.model.{name}.lora_B.weight"], layer.lora_B)
    assert report.path == tmp_path / "adapter_config.json"
    assert "layers.0.q_proj  8 x 8     2" in str(report) and "4 layers in" in str(report)


@pytest.mark.parametrize(("pad_rank", "rank"), [(True, 8), (8, 8), (3, 3), (2, 2), (False, 2)])
def test_all_layers_can_have_one_rank(tmp_path, pad_rank, rank):
    model = trained(lora_alpha=6)
    export_peft(model, tmp_path, pad_rank=pad_rank)
    config, tensors = entries(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert config["r"] == rank and config["rank_pattern"] == config["alpha_pattern"] == {}
    for name, layer in lora_layers(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
        assert a.shape[0] == b.shape[1] == rank
        expected = layer.scaling * layer.lora_B @ layer.lora_A
        torch.testing.assert_close(config["lora_alpha"] / rank * b @ a, expected)


@pytest.mark.parametrize("pad_rank", [1, 0, "8", 8.0])
def test_a_rank_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, pad_rank):
    with pytest.raises(ArgumentError, match="pad_rank"):
        export_peft(trained(), tmp_path / "adapter", pad_rank=pad_rank)
    assert not any(tmp_path.iterdir())


def test_vllm_has_no_rank_above_512(tmp_path):
    model = nn.Sequential(nn.Linear(600, 600))
    swap_(model, r=513)
    nn.init.normal_(model[0].lora_B)
    with pytest.raises(ArgumentError, match="at least 513, the rank of 0"):
        export_peft(model, tmp_path, pad_rank=True)


def test_vllm_takes_no_heads_which_the_report_says(tmp_path):
    report = export_peft(trained(modules_to_save=["head"]), tmp_path, pad_rank=True)
    assert "vLLM" in str(report) and "saved whole: head" in str(report)


def test_an_adapter_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"somebody's")
    save_adapter(trained(), tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    export_peft(trained(), tmp_path)
    export_peft(trained(lora_alpha=3), tmp_path)
    after = {path.name for path in tmp_path.iterdir()}
    assert after - before == {"adapter_config.json", "adapter_model.safetensors"}
    assert before < after and entries(tmp_path)["lora_alpha"] == 3


@pytest.mark.parametrize("text", ['{"architecture": "pfeiffer"}', "{", "[]", "3"])
def test_a_configuration_that_is_not_of_peft_is_not_replaced(tmp_path, text):
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(ArgumentError, match="not PEFT's"):
        export_peft(trained(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_text() == text


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_crash_leaves_one_adapter_or_none(tmp_path, monkeypatch, failing):
    export_peft(trained(lora_alpha=6), tmp_path)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()
    real, calls = os.replace, []

    def crash(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError("no space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        export_peft(trained(lora_alpha=3), tmp_path)
    there = (tmp_path / "adapter_config.json").exists()
    assert there == (failing == 1)
    assert not there or (tmp_path / "adapter_model.safetensors").read_bytes() == old


@pytest.mark.parametrize("folder", ["", None, 3])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(ArgumentError, match="^folder: got"):
        export_peft(trained(), folder)


def test_models_without_pairs_or_with_too_many_lambdas_are_refused(tmp_path):
    with pytest.raises(SwapError, match="without swapped layers"):
        export_peft(Model(), tmp_path)
    model = trained()
    optimizer = DeltaLoRA(model)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    layer = model.layers[0].q_proj
    layer.delta.past_updates = None
    with pytest.raises(SwapError, match="merge_"):
        export_peft(model, tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_layer_in_two_places_is_refused(tmp_path):
    """PEFT puts its layer in the first place, so the second would stay as it was."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    swap_(model, r=2)
    with pytest.raises(SwapError, match="2 places"):
        export_peft(model, tmp_path)


class Experts(nn.Module):
    """Stacked weights of experts, as transformers 5 has them."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))


def test_layers_that_peft_may_take_for_experts_are_told(tmp_path):
    model = nn.ModuleDict({"experts": Experts(), "down_proj": nn.Linear(4, 4)})
    swap_(model, r=2)
    with pytest.warns(UserWarning, match="down_proj among them, for pairs of the experts in exp"):
        report = export_peft(model, tmp_path)
    assert "experts" in str(report)


def test_wrappers_leave_no_trace_in_names(tmp_path):
    model = trained(modules_to_save=["head"])
    export_peft(model, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    model.layers[0] = torch.compile(model.layers[0])
    model.head = torch.compile(model.head)
    for name, wrapped in (("compiled", torch.compile(model)), ("dp", nn.DataParallel(model))):
        export_peft(wrapped, tmp_path / name)
        assert entries(tmp_path / name) == entries(tmp_path / "plain")
        found = load_file(tmp_path / name / "adapter_model.safetensors")
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_the_base_and_the_task_are_told(exported):
    tasks = {name: entries(place / "adapter") for name, (place, _, _) in exported.items()}
    assert tasks["lora"]["task_type"] == "CAUSAL_LM" and tasks["lora"]["auto_mapping"] is None
    assert tasks["classifier"]["task_type"] == "SEQ_CLS"
    assert tasks["classifier_in_parts"]["modules_to_save"] == ["classifier"]
    assert tasks["biases"]["bias"] == "lora_only"
    assert tasks["conv1d"]["fan_in_fan_out"] and not tasks["lora"]["fan_in_fan_out"]
