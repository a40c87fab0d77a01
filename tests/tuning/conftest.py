"""Fixtures of the tests of `deltadiff tune`."""

import pytest
from launch_tables import move_tables, read_files_again


@pytest.fixture
def files(tmp_path, monkeypatch):
    yield move_tables(tmp_path, monkeypatch)
    read_files_again()
