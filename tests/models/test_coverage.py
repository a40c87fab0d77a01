"""benchmarks/model_families.py: the table of what is covered is what the models give now."""

import importlib.util
import json
from pathlib import Path

import pytest
from families import FAMILIES
from family_runs import swapped

from deltadiff import swap_report

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


def test_each_weight_has_one_kind(script):
    model = swapped(FAMILIES["siglip"])
    kinds = dict(script.kinds_of_weight(model, swap_report(model)))
    assert len(kinds) == sum("lora_" not in name for name, _ in model.named_parameters())
    place, head = "vision_model.encoder.layers.0", "vision_model.head"
    assert kinds[f"{place}.self_attn.q_proj.weight"] == script.ADAPTED
    assert kinds[f"{place}.self_attn.q_proj.bias"] == "norms, biases and other vectors"
    assert kinds[f"{head}.attention.in_proj_weight"] == "parameters of MultiheadAttention"
    left = "linear layers that cannot have a pair"
    assert kinds[f"{head}.attention.out_proj.weight"] == left
    assert kinds["vision_model.embeddings.patch_embedding.weight"] == "convolutions"
    assert kinds["text_model.embeddings.token_embedding.weight"] == "embeddings"
