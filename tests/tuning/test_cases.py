"""The cases that the options of `deltadiff tune` ask for."""

import argparse
import json

import pytest

from deltadiff.bench.layer import GRAPHED, SHAPES
from deltadiff.checks import ROUNDINGS
from deltadiff.tuning import command
from deltadiff.tuning.cases import Linear, Update


def cases(*argv) -> list:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.chosen_cases(parser.parse_args(argv))


def sizes(found) -> set:
    return {(c.m, c.k, c.n) for c in found if isinstance(c, Linear)}


def test_cases_of_shapes_and_ranks():
    found = cases("--shapes", "64x32x48", "--ranks", "4", "8", "32")
    assert [(c.r, c.backward) for c in found if isinstance(c, Linear)] == [
        (8, False), (8, True), (32, False), (32, True)
    ]  # fmt: skip
    assert {(c.r, c.rounding) for c in found if isinstance(c, Update)} == {
        (r, rounding) for r in (8, 32) for rounding in ROUNDINGS
    }
    assert sizes(cases()) == {*SHAPES, *GRAPHED}


def test_cases_of_a_model(tmp_path):
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = cases("--config", str(tmp_path / "config.json"), "--tokens", "512")
    assert sizes(found) == {(512, 64, 64), (512, 64, 32), (512, 64, 96), (512, 96, 64)}
