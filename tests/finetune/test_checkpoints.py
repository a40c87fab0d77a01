"""Stopping a run, and going on with it from a checkpoint."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from finetune_runs import finetune, flip_a_bit, stop_at, train, without_times

from deltadiff.errors import CheckpointError
from deltadiff.files import read_sealed_json, write_sealed_json
from deltadiff.finetune import checkpoints, run, training
from deltadiff.finetune.checkpoints import open_latest

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


@pytest.fixture(scope="module")
def stopped(bert, reviews, tmp_path_factory):
    """The folder of a run that was stopped in its second stage, with two checkpoints."""
    output = tmp_path_factory.mktemp("stopped") / "out"
    words = ["--label-column", "label", "--method", "diffora", "--search-rounds", "2", "--r", "4"]
    words += ["--inner-steps", "1", "--steps", "6", "--save-every", "2", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, training, 5)
        assert finetune(bert, reviews, "--output", output, *words) == 130
    return output


def files_of_a_state(output) -> list[str]:
    """All files that a run goes on from."""
    places = [output / "search.pt", output / "settings.json", output / "inputs.json"]
    places += [p for p in (output / "checkpoint-5").rglob("*") if p.is_file()]
    return sorted(str(p.relative_to(output)) for p in places)


@pytest.mark.check(short=1, long=40)
def test_a_flipped_bit_is_refused_and_never_another_result(seed, stopped, tmp_path, capsys, tally):
    draw, refused, wrong = random.Random(seed), 0, []
    output = shutil.copytree(stopped, tmp_path / "out")
    for name in files_of_a_state(stopped):
        path = output / name
        place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
        flip_a_bit(path, place, bit)
        code = finetune("--resume", output)
        error = capsys.readouterr().err
        if code == 2 and len(error.splitlines()) == 1 and error.startswith("deltadiff finetune: "):
            refused += 1
            shutil.copy(stopped / name, path)
            continue
        # A bit that changes nothing of what the file says, such as one of its white space.
        same = code == 0 and json.loads((output / "result.json").read_text())["loss_curve"]
        if same != finished(stopped, tmp_path)["loss_curve"]:
            wrong.append((name, place, bit, code, error))
        shutil.rmtree(output)
        shutil.copytree(stopped, output)
    tally("mutants", "bits of a checkpoint", refused + len(wrong), failures=len(wrong))
    assert not wrong and refused >= len(files_of_a_state(stopped)) - 2


def finished(stopped, tmp_path) -> dict:
    """What the run leaves in result.json when nothing is changed."""
    output = tmp_path / "finished"
    if not output.exists():
        shutil.copytree(stopped, output)
        assert finetune("--resume", output) == 0
    return json.loads((output / "result.json").read_text())


def test_bits_of_the_list_of_a_checkpoint(stopped, tmp_path):
    output = shutil.copytree(stopped, tmp_path / "out")
    whole = open_latest(output).progress
    path = output / "checkpoint-5" / "checkpoint.json"
    blob, unnoticed = path.read_bytes(), 0
    for bit in range(0, 8 * len(blob), 151):
        path.write_bytes(blob)
        flip_a_bit(path, bit // 8, bit % 8)
        try:
            assert open_latest(output).progress == whole
            unnoticed += 1
        except CheckpointError:
            pass
    assert unnoticed < 8 * len("checksum")


def test_a_damaged_checkpoint_names_the_way_on(stopped, tmp_path, capsys):
    output = shutil.copytree(stopped, tmp_path / "out")
    whole = finished(stopped, tmp_path)
    flip_a_bit(output / "checkpoint-5" / "state.pt", 1000)
    capsys.readouterr()
    assert finetune("--resume", output) == 2
    error = capsys.readouterr().err
    damaged = output / "checkpoint-5"
    assert f"{damaged / 'state.pt'}: got another SHA-256" in error
    assert f"remove {damaged} to go on from checkpoint-4" in error
    shutil.rmtree(damaged)
    assert finetune("--resume", output) == 0
    assert without_times(json.loads((output / "result.json").read_text())) == without_times(whole)


@pytest.mark.parametrize(
    ("version", "told"),
    [(1, "a checkpoint of version 1, which has no checksums"), (3, "version 3")],
)
def test_checkpoints_of_other_versions(version, told, stopped, tmp_path, capsys):
    output = shutil.copytree(stopped, tmp_path / "out")
    path = output / "checkpoint-5" / "checkpoint.json"
    if version == 1:
        path.rename(path.with_name("progress.json"))
    else:
        write_sealed_json(path, read_sealed_json(path, "") | {"version": version})
    assert finetune("--resume", output) == 2
    assert told in capsys.readouterr().err


def test_two_checkpoints_are_kept_and_the_files_of_others_too(bert, reviews, tmp_path, monkeypatch):
    output, kept = tmp_path / "out", []
    real = checkpoints.save_checkpoint

    def save(*args):
        target = real(*args)
        kept.append([p.name for p in checkpoints.find_checkpoints(output)])
        for name in ("checkpoint-notes", "checkpoint-2/notes", ".checkpoint-2.swp"):
            if (output / name).parent.exists():
                (output / name).write_text("mine")
        return target

    monkeypatch.setattr(run, "save_checkpoint", save)
    train(bert, reviews, output, "--steps", "9", "--save-every", "2")
    names = [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert kept == [names[:1], names[:2], names[1:3], names[2:]]
    left = {str(p.relative_to(output)) for p in output.rglob("*checkpoint*") if p != output}
    assert left == {"checkpoint-notes", "checkpoint-2", ".checkpoint-2.swp"}
    assert [p.name for p in (output / "checkpoint-2").iterdir()] == ["notes"]


def test_ctrl_c_in_a_terminal(bert, reviews, tmp_path):
    out = tmp_path / "out"
    words = ["finetune", bert, reviews, "--label-column", "label", "--output", out, "--steps"]
    words += ["100000", "--save-every", "5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deltadiff", *map(str, words)], cwd=tmp_path,
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
    assert open_latest(out).progress.step >= 5
