"""Fixtures of the tests of `deltadiff bench`."""

import json

import pytest
from tiny_bench import LLAMA


@pytest.fixture
def llama_config(tmp_path):
    """The config.json of a tiny Llama, in a folder of the name "tiny"."""
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA))
    return path
