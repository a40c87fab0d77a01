"""The similarity of fine-tuned and original weights."""

import pytest
import torch
from finetune_runs import prepare, train_method

from deltadiff.finetune.models import load_model
from deltadiff.finetune.weight_change import similarity

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_similarity_of_a_known_change(bert, reviews):
    """The cosine of W and W + s B A, worked out in float64."""
    inputs, prepared = prepare("lora", bert, reviews, target_modules="query,dense")
    layer = prepared.module.bert.encoder.layer[1].attention.self.query
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    original = load_model(bert, inputs.model.task).module
    w = layer.weight.detach().double()
    v = w + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    found = similarity(prepared.module, original)
    assert list(found) == ["attention.self.query"] and list(found["attention.self.query"]) == [
        "0",
        "1",
    ]
    assert found["attention.self.query"]["0"] == pytest.approx(1, abs=1e-12)
    cosine = (w * v).sum() / (w.norm() * v.norm())
    assert found["attention.self.query"]["1"] == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.parametrize("method", ["full", "delta-lora", "delta-lora-factored", "lora-peft"])
def test_similarity_is_in_the_result(method, bert, reviews, tmp_path):
    result = train_method(tmp_path / "out", method, bert, reviews, "--steps", 30)
    places = result["similarity"]
    assert len(places) == 6 and all(list(blocks) == ["0", "1"] for blocks in places.values())
    assert all(0 < c < 1 for blocks in places.values() for c in blocks.values())
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")
