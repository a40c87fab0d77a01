"""Stopping a run, and going on with it from a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from finetune_runs import VARIANTS, finetune, stop_at, train
from safetensors.torch import load_file

from deltadiff.finetune import training

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", [*VARIANTS, "inplace bfloat16"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    method, bert, reviews, tmp_path, monkeypatch, capsys
):
    if method == "eager":
        pytest.importorskip("peft")
    method, _, dtype = method.partition(" ")
    words = [*VARIANTS[method], "--steps", "24", "--save-every", "7", "--dtype", dtype or "float32"]
    whole = train(bert, reviews, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_at(patch, training, 16)
        out = tmp_path / "parts"
        fixed = ["--label-column", "label", "--lr", "0.01", "--start-step", "3", "--device", "cpu"]
        assert finetune(bert, reviews, "--output", out, *fixed, *words) == 130
    assert f"deltadiff finetune --resume {out}" in capsys.readouterr().out
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-16"]
    assert finetune("--resume", out) == 0
    assert not list(out.glob("*checkpoint*"))
    parts = json.loads((out / "result.json").read_text())
    adapters = [next((tmp_path / d / "adapter").glob("*.safetensors")) for d in ("whole", "parts")]
    pairs = [load_file(path) for path in adapters]
    assert whole["before"] == parts["before"]
    if method == "inplace":  # the checkpoint holds W's update as factors, which round differently
        eps = 2.0**-8 if dtype else 1e-4
        assert parts["loss_curve"] == pytest.approx(whole["loss_curve"], rel=eps)
        assert parts["after"] == pytest.approx(whole["after"], rel=eps)
        assert parts["weight_update"] == pytest.approx(whole["weight_update"], rel=eps)
    else:
        assert parts["loss_curve"] == whole["loss_curve"]
        assert parts["after"] == whole["after"]
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    assert finetune("--resume", out) == 2  # finished


def test_a_run_that_saves_memory_is_resumed(llama, reviews, tmp_path, monkeypatch):
    words = ["--method", "lora", "--gradient-accumulation", "2", "--gradient-checkpointing"]
    words += ["--batch-size", "4", "--lora-dropout", "0.1", "--steps", "6"]
    whole = train(llama, reviews, tmp_path / "whole", *words, labels=False)
    fixed = ["--lr", "0.01", "--start-step", "3", "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_at(patch, training, 4)
        assert finetune(llama, reviews, "--output", tmp_path / "out", *fixed, *words) == 130
    assert finetune("--resume", tmp_path / "out") == 0
    parts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert parts["loss_curve"] == whole["loss_curve"] and parts["after"] == whole["after"]


def test_resuming_before_the_first_checkpoint_starts_anew(bert, reviews, tmp_path):
    whole = train(bert, reviews, tmp_path / "whole", "--steps", "4")
    part = tmp_path / "part"
    part.mkdir()
    (part / "settings.json").write_text(json.dumps(whole["settings"]))
    assert finetune("--resume", part) == 0
    assert json.loads((part / "result.json").read_text())["loss_curve"] == whole["loss_curve"]


def test_a_garbled_checkpoint_is_refused(bert, reviews, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, training, 3)
        assert finetune(bert, reviews, "--label-column", "label", "--output", tmp_path / "o") == 130
    state = tmp_path / "o" / "checkpoint-3" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert finetune("--resume", tmp_path / "o") == 2
    assert "checkpoint-3" in capsys.readouterr().err


def test_ctrl_c_in_a_terminal(bert, reviews, tmp_path):
    out = tmp_path / "out"
    words = ["finetune", bert, reviews, "--label-column", "label", "--output", out, "--steps"]
    words += ["100000", "--save-every", "5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "deltadiff", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for _ in range(600):
            if list(out.glob("checkpoint-*")) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"--resume {out}" in told
    assert "Traceback" not in errors
    (checkpoint,) = out.glob("checkpoint-*")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] >= 5
