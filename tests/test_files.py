"""Files are written whole or not at all, and reading errors name the file."""

import json
import os
import random
import stat
import subprocess
import sys
import time

import pytest

from deltadiff.errors import ArgumentError, CheckpointError
from deltadiff.files import (
    read_sealed,
    read_sealed_json,
    reading,
    remove_leftovers,
    slug,
    whole_folder,
    write_bytes,
    write_csv,
    write_json,
    write_sealed,
    write_sealed_json,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    write_bytes(path, "näw".encode())
    assert path.read_text(encoding="utf-8") == "näw" and names(tmp_path) == ["file"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_an_error_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_json_has_no_nan(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": [1, None]})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None]}


def test_csv(tmp_path):
    write_csv(tmp_path / "file.csv", [["a", 1], ['say "b"', "two\nlines"]])
    assert (tmp_path / "file.csv").read_bytes() == b'a,1\r\n"say ""b""","two\nlines"\r\n'


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_appears_at_once(empty, tmp_path):
    target = tmp_path / "folder"
    if empty:
        target.mkdir()
    with whole_folder(target) as parts:
        (parts / "a").write_text("new")
        (parts / "below").mkdir()
        assert target.exists() == empty and not list(target.glob("*"))
    assert names(target) == ["a", "below"] and (target / "a").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_a_folder_with_files_is_not_replaced(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(OSError, match="not empty"), whole_folder(target) as parts:
        (parts / "a").write_text("new")
    assert names(tmp_path) == ["folder"] and (target / "a").read_text() == "old"


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    ours = [".file.abcdefgh", ".file.a_1234zz", ".folder-3.00000000/with/files"]
    others = ["file", ".file.swp", ".file.ABCDEFGH", ".other.abcdefgh", "x.file.abcdefgh"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".file.linklink").symlink_to(tmp_path / "file")
    with whole_folder(tmp_path / "folder-4") as parts:
        (parts / "a").write_text("")
        remove_leftovers(tmp_path, r"file|folder-\d")
        assert parts.exists()  # it is at work
    assert names(tmp_path) == sorted([*others, ".file.linklink", "folder-4"])
    remove_leftovers(tmp_path / "missing", "file")


def flipped(blob: bytes, bit: int) -> bytes:
    changed = bytearray(blob)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_in_sealed_bytes(tmp_path):
    path, blob = tmp_path / "file", bytes(range(256))
    write_sealed(path, blob)
    assert read_sealed(path) == blob
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(CheckpointError, match="another SHA-256"):
            read_sealed(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_sealed(path)


def test_a_flipped_bit_in_sealed_json(tmp_path):
    path, value = tmp_path / "file", {"a": [1, 0.1, None], "b": {"é": True, "c": "text"}}
    write_sealed_json(path, value)
    assert read_sealed_json(path, "JSON") == value
    whole, harmless = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        path.write_bytes(flipped(whole, bit))
        try:
            read = read_sealed_json(path, "JSON")
        except CheckpointError:
            continue
        harmless += 1  # in the name of the entry, or white space
        assert {k: v for k, v in read.items() if k in value} == value
    assert harmless < 8 * len("checksum") + 10


def test_what_earlier_versions_wrote_is_read(tmp_path):
    (tmp_path / "a").write_text('{"b": 1}')
    assert read_sealed_json(tmp_path / "a", "JSON") == {"b": 1}
    (tmp_path / "a").write_bytes(b"PK a file of torch.save")
    assert read_sealed(tmp_path / "a") == b"PK a file of torch.save"
    (tmp_path / "a").write_text("[1]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_sealed_json(tmp_path / "a", "JSON")


def test_an_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as parts:
        (parts / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old" and names(tmp_path) == ["folder"]


WRITER = """
import sys
from pathlib import Path
from deltadiff.files import whole_folder, write_bytes

place = Path(sys.argv[1])
for i in range(10**6):
    write_bytes(place / "file", bytes([i % 256]) * 300_000)
    with whole_folder(place / f"folder-{i}") as parts:
        for name in "abc":
            (parts / name).write_bytes(bytes([i % 256]) * 10_000)
    if i == 0:
        print("ready", flush=True)
"""


@pytest.mark.check(short=1, long=30)
def test_killed_at_any_moment(seed, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.Random(seed).uniform(0, 0.2))
    finally:
        process.kill()
        process.communicate()
    blob = (tmp_path / "file").read_bytes()
    assert len(blob) == 300_000 and len(set(blob)) == 1
    folders = list(tmp_path.glob("folder-*"))
    assert folders
    for folder in folders:
        assert names(folder) == ["a", "b", "c"]
        assert {(folder / name).stat().st_size for name in "abc"} == {10_000}


def test_reading_names_the_file(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(CheckpointError) as caught, reading(path, "JSON"):
        json.loads("{")
    assert str(caught.value).startswith(f"{path}: got Expecting property name")
    assert str(caught.value).endswith("; accepted: JSON")
    with pytest.raises(CheckpointError, match="got KeyError|got 'a'"), reading(path, "JSON"):
        {}["a"]
    with pytest.raises(CheckpointError, match="got EOFError"), reading(path, "JSON"):
        raise EOFError
    with pytest.raises(ArgumentError, match="^r: got 0"), reading(path, "JSON"):
        raise ArgumentError("r", 0, "an int >= 1")


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R) Processor") == "intel-r-xeon-r-processor"
