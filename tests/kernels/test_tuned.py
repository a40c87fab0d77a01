"""Tables of launch configurations: which row a launch gets, and files that cannot be used."""

import json

import pytest
from launch_tables import (
    ARGS,
    CPU,
    GPU,
    KEY,
    ROW,
    chosen,
    move_tables,
    read_files_again,
    table,
)

from deltadiff.kernels.launch_configs import LAUNCH_CONFIGS
from deltadiff.kernels.lora_linear.hopper_config import hopper_config
from deltadiff.kernels.runtime import tuned
from deltadiff.kernels.runtime.tuned import TableError

DEFAULT_ARGS = {
    "lora_linear_down": (64, 64, 8, 2),
    "lora_linear_fwd": (64, 64, 8, 2, "ieee", 99),
    "lora_linear_few": (64, 64, 64, 8, 99),
    "lora_linear_wgrad": (64, 64, 8, 2),
    "lora_linear_hopper": ARGS,
    "delta_update": ((9, 0), "nearest", 16, 2),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    yield move_tables(tmp_path, monkeypatch)
    read_files_again()


# ------------------------------------------------------------------------- look-up


def test_without_a_table_it_is_the_default(files):
    assert chosen(CPU) == chosen(GPU) == hopper_config(*ARGS)
    assert tuned.describe(GPU) == tuned.describe(CPU) == "defaults"


def test_row_replaces_its_entries_only(files):
    files[0].write_text(table(ROW))
    default = hopper_config(*ARGS)
    assert chosen(GPU) == default | {"GROUP_SIZE_M": 4} != default
    assert chosen(GPU, (5000, *KEY[1:])) == chosen(GPU)  # tokens up to a power of two
    for other in ((4096, *KEY[1:]), (8192, 4096, 4096, 16, True), (8192, 4096, 4096, 32, False)):
        assert chosen(GPU, other) == default
    assert chosen(CPU) == default


def test_launchers_may_change_what_they_got():
    chosen(CPU).clear()
    assert chosen(CPU) == hopper_config(*ARGS)


def test_the_users_row_comes_before_the_shipped_one(files):
    other = {**ROW, "key": {**ROW["key"], "N": 11008}}
    files[0].write_text(table(ROW, other))
    files[1].write_text(table({**ROW, "config": {"GROUP_SIZE_M": 32}}))
    assert chosen(GPU)["GROUP_SIZE_M"] == 32
    assert chosen(GPU, (8192, 11008, 4096, 16, False))["GROUP_SIZE_M"] == 4
    text = tuned.describe(GPU)
    assert f"2 shipped ({files[0]})" in text and f"1 user's ({files[1]})" in text


@pytest.mark.parametrize("op", LAUNCH_CONFIGS)
def test_rows_are_about_entries_that_launchers_know(op):
    declared = LAUNCH_CONFIGS[op]
    entries = declared.entries
    assert set(entries) <= set(declared.default(*DEFAULT_ARGS[op])) and "splits" not in entries
    for candidate in declared.candidates:
        assert candidate and set(candidate) <= set(entries)


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "change, words",
    [
        ({"op": "matmul"}, "an op of"),
        ({"key": {"M": 8192}}, "values for M, N, K"),
        ({"key": {**ROW["key"], "N": "wide"}}, "numbers, true"),
        ({"key": {**ROW["key"], "M": 5000}}, "powers of two"),
        ({"key": {**ROW["key"], "rank": 8}}, "at least 16"),
        ({"config": {"BLOCK_SIZE_Q": 64}}, "some of BLOCK_SIZE_N"),
        ({"config": {"BLOCK_SIZE_N": 96}}, "a power of two"),
        ({"config": {"STAGES": 0}}, "at least 1"),
        ({"config": {"STAGES": True}}, "at least 1"),
        ({"config": None}, "some of"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, words):
    path = tmp_path / "table.json"
    path.write_text(table(ROW, ROW | change))
    with pytest.raises(TableError, match=words) as raised:
        tuned.load(path)
    assert str(raised.value).startswith(f"{path}, row 1: got ")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1, "rows": 3}', "\xff"])
def test_what_is_no_table_is_named(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TableError, match="deltadiff tune"):
        tuned.load(path)


def test_table_for_other_kernels_is_ignored(files):
    files[0].write_text(table({"op": "of another time"}, version=tuned.VERSION + 1))
    with pytest.warns(UserWarning, match=f"{files[0]} is for version .*: ignored"):
        assert chosen(GPU) == hopper_config(*ARGS)


@pytest.mark.parametrize("shipped", sorted(tuned.shipped_path("x").parent.glob("*.json")), ids=str)
def test_shipped_tables(shipped, recwarn):
    assert tuned.load(shipped) and not recwarn
    assert shipped == tuned.shipped_path(json.loads(shipped.read_text())["gpu"])
