"""The command `deltadiff bench`: its files, its exit codes, and what it refuses."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tiny_bench import KEYS, SEARCHED

from deltadiff.__main__ import main
from deltadiff.bench import command
from deltadiff.bench import search as bench_search
from deltadiff.bench.methods import Settings
from deltadiff.bench.models import shape_of_file
from deltadiff.bench.own_process import peer_timings, why_no_peer
from deltadiff.bench.plots import stale_plots

for package in ("transformers", "matplotlib"):
    pytest.importorskip(package)


def test_layer(tmp_path, capsys):
    argv = ["bench", "layer", "--device", "cpu", "--quick", "--shapes", "16x24x32", "--ranks", "4"]
    argv += ["8", "--variants", "deltadiff", "eager", "--output", str(tmp_path)]
    assert main(argv) == 0
    assert "16x24x32 r8" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()  # no plot of two points
    records = json.loads(path.read_text())
    assert len(records) == 2 * 2 * 3
    for r in records:
        assert r.keys() >= KEYS and r["op"] == "lora_linear" and math.isfinite(r["over_floor"])
    assert {r["variant"] for r in records} == {"frozen", "deltadiff", "eager"}


def test_model(llama_config, tmp_path, capsys):
    argv = ["bench", "model", "--device", "cpu", "--config", str(llama_config), "--steps", "1"]
    argv += ["--batch", "1", "--sequence", "8", "--r", "4", "--output", str(tmp_path)]
    assert main(argv) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("model-*.json")
    records = json.loads(path.read_text())
    assert all(r.keys() >= KEYS | {"model", "targets", "checkpointing"} for r in records)
    assert {r["targets"] for r in records} == {"q,v", "all", None}
    assert {r["checkpointing"] for r in records if r["variant"] == "deltadiff"} == {False, True}
    assert all(r["over_floor"] == 1 for r in records if r["variant"] == "frozen")
    assert stale_plots(records, tmp_path) == []


def test_offloading_needs_a_gpu_and_checkpointing(llama_config, capsys):
    argv = ["bench", "model", "--device", "cpu", "--config", str(llama_config), "--offload"]
    for library in ("transformers", "trl"):
        assert main([*argv, library]) == 2
        assert f"--offload: got {library} on cpu" in capsys.readouterr().err
    assert main([*argv, "trl", "--checkpointing", "off"]) == 2
    assert "--offload: got --checkpointing off" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_offloaded_checkpointing(library, llama_config, tmp_path, capsys):
    argv = ["bench", "model", "--device", "cuda", "--config", str(llama_config), "--steps", "1"]
    argv += ["--batch", "1", "--sequence", "64", "--r", "8", "--variants", "deltadiff"]
    assert main([*argv, "--offload", library, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("whole_step-*.json")
    records = json.loads(path.read_text())
    assert {(r["checkpointing"], r["offload"]) for r in records} == {(True, library)}
    assert f"offloaded by {library}" in capsys.readouterr().out


@pytest.mark.long
def test_peers_in_processes_of_their_own(llama_config, tmp_path, capsys, monkeypatch):
    argv = ["bench", "model", "--device", "cpu", "--config", str(llama_config), "--steps", "1"]
    argv += ["--batch", "1", "--sequence", "8", "--r", "4", "--variants", "deltadiff", "--peers"]
    argv += ["peft-alone", "unsloth", "--checkpointing", "on"]
    monkeypatch.setattr(
        command, "why_no_peer", lambda name: "it is missing" if name == "unsloth" else None
    )
    assert main([*argv, "--output", str(tmp_path)]) == 0, capsys.readouterr().err
    (path,) = tmp_path.glob("whole_step-*.json")
    records = {r["variant"]: r for r in json.loads(path.read_text())}
    assert records.keys() == {"frozen", "deltadiff", "peft-alone"}
    assert records["peft-alone"]["over_floor"] > 0 and records["peft-alone"]["targets"] == "all"
    assert "left out: unsloth, for it is missing" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(why_no_peer("unsloth") is None, reason="it is installed, and may not fail")
def test_a_peer_that_fails_has_a_note(llama_config):
    shape = shape_of_file(llama_config)
    settings = Settings(batch=1, sequence=8, r=4, dtype=torch.float32, steps=1)
    settings = replace(settings, peers=("unsloth",))
    found = list(peer_timings(shape, settings, [False], torch.device("cpu")))
    ((name, on, timing),) = found
    assert (name, on) == ("unsloth", False) and not timing.seconds and "Error" in timing.note


def test_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_search, "CPU_SHAPES", SEARCHED[1:])
    argv = ["bench", "search", "--device", "cpu", "--variants", "eager", "--output", str(tmp_path)]
    assert main([*argv, "--quick"]) == 0
    assert main(argv) == 0, capsys.readouterr().err
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert all(r.keys() >= KEYS | {"model", "adapter_dtype"} for r in records)
    assert [(r["mode"], r["variant"]) for r in records] == [
        (mode, variant) for mode in bench_search.MODES for variant in ("frozen", "eager")
    ]
    assert all((r["over_floor"] == 1) == (r["variant"] == "frozen") for r in records)


def test_config_that_cannot_be_used(tmp_path, capsys):
    path = tmp_path / "config.json"
    for text in ("{", '{"model_type": "resnet"}'):
        path.write_text(text)
        assert main(["bench", "model", "--device", "cpu", "--config", str(path)]) == 2
        assert "deltadiff: --config: got" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["layer", "--shapes", "16x24"], ["layer", "--ranks", "0"], []])
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *words])
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
