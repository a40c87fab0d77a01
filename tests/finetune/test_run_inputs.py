"""A run goes on with the settings, text and model that it began with, or says what differs."""

import json
import shutil

import pytest
from finetune_runs import finetune, flip_a_bit, stop_at, train

from deltadiff.finetune import training
from deltadiff.finetune.run_inputs import INPUTS_FILE, check_inputs
from deltadiff.finetune.settings import read_settings

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stopped(bert, reviews, tmp_path, monkeypatch):
    """The folder of a run that was stopped; its text and its model are copies in ``tmp_path``."""
    model, data = shutil.copytree(bert, tmp_path / "bert"), tmp_path / "reviews.csv"
    for name in ("reviews.csv", "heldout.csv"):
        shutil.copy(reviews, tmp_path / name)
    output = tmp_path / "out"
    words = ["--output", output, "--label-column", "label", "--steps", "4", "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_at(patch, training, 2)
        assert finetune(model, data, "--heldout", tmp_path / "heldout.csv", *words) == 130
    return output


def change_settings(folder):
    path = folder / "out" / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lr": 0.25}))


def append(name):
    def change(folder):
        with (folder / name).open("a") as file:
            file.write("a fine film,fun\n")

    return change


def flip(name):
    return lambda folder: flip_a_bit(folder / name, -9)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_settings, "lr was 0.001 and is 0.25"),
        (append("reviews.csv"), "data file reviews.csv had "),
        (append("heldout.csv"), "heldout file heldout.csv had "),
        (flip("bert/model.safetensors"), "model file model.safetensors has another SHA-256"),
        (lambda folder: (folder / "bert" / "vocab.txt").touch(), "model file vocab.txt is new"),
    ],
)
def test_changes(change, told, stopped, tmp_path, capsys):
    change(tmp_path)
    assert finetune("--resume", stopped) == 2
    error = capsys.readouterr().err
    assert told in error and "--accept-changes to go on" in error and error.count("\n") == 1
    assert finetune("--resume", stopped, "--accept-changes") == 0
    out = capsys.readouterr().out
    assert f"going on all the same: {stopped}, which began with others: {told}" in out
    assert "going on after step 2 of 4" in out
    check_inputs(stopped, read_settings(stopped))  # they count from now on


def test_what_may_change(stopped, tmp_path):
    (tmp_path / "bert" / "README.md").write_text("not read by a run")
    stopped = stopped.rename(tmp_path / "elsewhere")
    assert finetune("--resume", stopped) == 0


def test_a_state_without_inputs(stopped, capsys):
    (stopped / INPUTS_FILE).unlink()
    assert finetune("--resume", stopped) == 2
    assert INPUTS_FILE in capsys.readouterr().err


def test_accepting_without_a_run(bert, reviews, tmp_path, capsys):
    assert finetune(bert, reviews, "--output", tmp_path / "out", "--accept-changes") == 2
    assert "accept_changes: got no run to resume" in capsys.readouterr().err


def test_what_is_written(bert, reviews, tmp_path):
    train(bert, reviews, tmp_path / "out", "--steps", "1")
    inputs = json.loads((tmp_path / "out" / INPUTS_FILE).read_text())
    assert set(inputs["files"]["model"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert list(inputs["files"]["data"]) == ["reviews.csv"]
    assert inputs["settings"]["steps"] == 1 and "output" not in inputs["settings"]
