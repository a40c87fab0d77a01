"""The command `deltadiff tune`, with findings that a test says on a GPU that need not be there."""

import pytest
import torch
from launch_tables import GPU, HOPPER, chosen

from deltadiff.__main__ import main
from deltadiff.kernels.runtime import tuned
from deltadiff.tuning import command
from deltadiff.tuning.sweep import Finding


@pytest.fixture
def found(files, monkeypatch):
    monkeypatch.setattr(command, "find_gpu", lambda name: GPU)

    def find(entries):
        finding = Finding(HOPPER, {}, entries, 1e-3, 1.1, 3)
        monkeypatch.setattr(command, "measure", lambda *_: iter([finding]))

    return find


def test_what_wins_is_used_from_now_on(files, found, capsys):
    found({"GROUP_SIZE_M": 4})
    assert main(["tune"]) == 0
    assert chosen(GPU)["GROUP_SIZE_M"] == 4
    found({})
    assert main(["tune"]) == 0
    assert tuned.load(files[1]) == {}
    assert f"0 rows in {files[1]}" in capsys.readouterr().out


def test_output_and_remove(files, found, tmp_path):
    found({"GROUP_SIZE_M": 4})
    assert main(["tune", "--output", str(tmp_path / "out.json")]) == 0
    assert len(tuned.load(tmp_path / "out.json")) == 1 and not files[1].exists()
    assert main(["tune"]) == 0 and files[1].exists()
    for _ in range(2):
        assert main(["tune", "--remove"]) == 0
        assert not files[1].exists()


def test_bad_table_is_an_error_of_one_line(files, found, capsys):
    found({})
    files[1].write_text("{")
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(files[1]) in error and "--remove" in error


def test_without_a_gpu_there_is_nothing_to_tune(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("deltadiff: device: got 'cuda'") and "nothing to tune" in error


@pytest.mark.gpu
def test_tune_on_a_gpu(tmp_path, capsys):
    path = tmp_path / "table.json"
    shapes = ["--shapes", "64x256x512", "1024x512x768"]
    assert main(["tune", *shapes, "--ranks", "8", "--output", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "left out" not in out + err and out.count(": lora_linear_") >= 4
    assert out.count(": delta_update ") == 3
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert out.count(": lora_linear_hopper ") == 2 * hopper
    tuned.load(path)
