"""The lock of an output folder: who holds it, who may take it, and what is left behind."""

import os
import subprocess
import sys

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.folder_lock import LOCK_FILE, locked

HOLD = """
import sys
from pathlib import Path
from deltadiff.finetune.folder_lock import locked

with locked(Path(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of ``tmp_path / "out"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_says_who_is_at_work(holder, tmp_path):
    told = rf"output: got .*out, where process {holder.pid} on .* since 20.* is at work"
    with pytest.raises(ArgumentError, match=told), locked(tmp_path / "out"):
        raise AssertionError
    assert (tmp_path / "out" / LOCK_FILE).exists()
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / LOCK_FILE).exists()  # which nobody holds any more
    with locked(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / LOCK_FILE).read_text()
    assert not list((tmp_path / "out").iterdir())


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "here" / "a" / "b"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.rglob("*")] == ["here"]
    with locked(tmp_path / "here" / "a" / "b"):
        (tmp_path / "here" / "a" / "b" / "file").touch()
    assert [p.name for p in (tmp_path / "here" / "a" / "b").iterdir()] == ["file"]


def test_one_lock_after_the_other(tmp_path):
    for _ in range(3):
        with locked(tmp_path), pytest.raises(ArgumentError, match="is at work"), locked(tmp_path):
            raise AssertionError


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path):
        pass
    assert "cannot be locked ([Errno 95] Operation not supported)" in capsys.readouterr().out


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="output: got .*file"), locked(tmp_path / "file"):
        raise AssertionError
