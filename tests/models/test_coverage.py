"""benchmarks/model_families.py: the table of what is covered is what the models give now."""

import importlib.util
import json
from pathlib import Path

import pytest
from families import FAMILIES

from deltadiff import swap_

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_families.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("model_families", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(script) -> dict[str, dict]:
    return {r["family"]: r for r in json.loads(script.RESULT.read_text())}


def test_the_written_record_is_up_to_date(script, written, family):
    found = {k: v for k, v in written[family.name].items() if k not in script.VERSIONS}
    assert found == script.record(family), "run benchmarks/model_families.py, then tables.py"


def test_no_other_family_is_written(written):
    assert list(written) == list(FAMILIES)


def test_all_of_the_weight_is_counted(written):
    for r in written.values():
        assert r["layers"] > 0 and abs(sum(r["shares"].values()) - 1) < 1e-5


def test_reasons_are_those_of_the_report_without_the_sizes_of_the_tiny_model(script):
    kinds = script.kinds_of_weight(swap_(FAMILIES["mixtral"].build(), r=2))
    assert script.find_kind("model.layers.31.self_attn.q_proj", kinds) == script.ADAPTED
    assert script.find_kind("model.layers.31.mlp.experts.down_proj", kinds) == "experts"
    assert script.find_kind("model.layers.31.mlp.gate", kinds) == "MixtralTopKRouter"
    assert script.find_kind("lm_head", kinds) == "the output head"
    with pytest.raises(KeyError, match="adapter"):
        script.find_kind("model.layers.0.adapter", kinds)
    kinds = script.kinds_of_weight(swap_(FAMILIES["deberta-v2"].build(), r=2))
    assert script.find_kind("pooler.dense", kinds) == script.WHOLE
    assert script.find_kind("deberta.embeddings.word_embeddings", kinds) == "an embedding"
