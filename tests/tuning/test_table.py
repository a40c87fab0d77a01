"""The table that is written: it is read again, and what wins replaces what was there."""

import pytest
from launch_tables import ARGS, GPU, HOPPER, NAME, ROW, chosen, table

from deltadiff.errors import ArgumentError
from deltadiff.kernels.lora_linear.hopper_config import hopper_config
from deltadiff.kernels.runtime import tuned
from deltadiff.kernels.runtime.tuned import Launch
from deltadiff.tuning.sweep import Finding
from deltadiff.tuning.table import keep, read, write

OTHER = Launch("delta_update", (16, 2, "nearest"))


def finding(entries, launch=HOPPER):
    return Finding(launch, {}, entries, 1e-3, 1.1, 3)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "table.json"
    rows = {OTHER: {"num_warps": 8}, HOPPER: {}}
    for _ in range(2):
        write(path, NAME, rows)
        assert read(path) == rows
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ArgumentError, match="--output"):
        write(path / "below a file", NAME, rows)


def test_what_is_no_table_cannot_be_read(tmp_path):
    path = tmp_path / "table.json"
    assert read(path) == {}
    path.write_text("{")
    with pytest.raises(ArgumentError, match=f"table: got {path}.*--remove"):
        read(path)


def test_what_wins_is_kept_beside_what_was_not_measured(tmp_path):
    path = tmp_path / "table.json"
    before = {OTHER: {"num_warps": 8}}
    rows = keep([finding({"GROUP_SIZE_M": 4})], path, NAME, before, {})
    assert rows == read(path) == {**before, HOPPER: {"GROUP_SIZE_M": 4}}
    assert keep([finding({}), finding({}, OTHER)], path, NAME, rows, {}) == read(path) == {}


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    path = tmp_path / "table.json"

    def interrupted():
        yield finding({"GROUP_SIZE_M": 4})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(interrupted(), path, NAME, {}, {})
    assert read(path) == {HOPPER: {"GROUP_SIZE_M": 4}}


def test_a_default_that_wins_replaces_the_shipped_row(files):
    shipped, users = files
    shipped.write_text(table(ROW))
    assert chosen(GPU)["GROUP_SIZE_M"] == 4
    keep([finding({})], users, NAME, {}, read(shipped))
    tuned.use(GPU, None)
    assert chosen(GPU) == hopper_config(*ARGS)


def test_what_one_of_two_cases_found_stays(tmp_path):
    found = [finding({}), finding({"GROUP_SIZE_M": 4}), finding({})]
    rows = keep(found, tmp_path / "table.json", NAME, {}, {})
    assert rows == {HOPPER: {"GROUP_SIZE_M": 4}}
