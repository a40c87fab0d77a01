"""Stopping a run, and going on with it from a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from finetune_runs import finetune, stop_at, train

from deltadiff.finetune import training

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


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
