"""`deltadiff theory`: its table, its files, and input that cannot be used."""

import json

import pytest
from commands import refused

from deltadiff.__main__ import main
from deltadiff.diffora.theory import command
from deltadiff.diffora.theory.experiment import SETTINGS, Size

SMALL = Size(points=4, inputs=6, hidden=64, steps=10, samples=500)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(command, "SIZE", SMALL)


def test_table_and_files(small, tmp_path, capsys):
    assert main(["theory", "--draws", "2", "--output", str(tmp_path / "new"), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert all(s.selection in text and s.frozen in text for s in SETTINGS) and "of 2" in text
    found = json.loads((tmp_path / "new" / "theory.json").read_text())
    assert found["seed"] == 3 and found["size"]["draws"] == 2
    assert len(found["settings"]) == len(SETTINGS)
    assert (tmp_path / "new" / "theory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv", [["--draws", "0"], ["--seed", "-1"], ["--output", ""]])
def test_input_that_cannot_be_used(argv, small, capsys):
    assert argv[0].removeprefix("--") in refused(capsys, "theory", *argv)
