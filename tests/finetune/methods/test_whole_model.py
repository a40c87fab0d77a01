"""Full fine-tuning and BitFit: what they train, in which dtype, and the model that they save."""

import pytest
import torch
from finetune_runs import finetune, prepare, train_method, trained_names

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_which_parameters_are_trained(bert, reviews):
    names = {
        m: trained_names(prepare(m, bert, reviews)[1].module)
        for m in ("full", "full-no-embeddings", "full-qv")
    }
    embeddings = {n for n in names["full"] if "embeddings." in n and "LayerNorm" not in n}
    assert names["full-no-embeddings"] == names["full"] - embeddings
    assert len(embeddings) == 3
    matrices = {f"bert.encoder.layer.{i}.attention.self.{m}.weight" for i in (0, 1)
                for m in ("query", "value")}  # fmt: skip
    assert names["full-qv"] == matrices | {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("method", ["full-qv", "bitfit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_trained_is_float32_in_a_16_bit_model(method, dtype, bert, reviews, tmp_path):
    task, prepared = prepare(method, bert, reviews, dtype=dtype)
    trained = {p.dtype for p in prepared.module.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    frozen = prepared.module.bert.encoder.layer[0].intermediate.dense.weight
    assert frozen.dtype == getattr(torch, dtype)
    result = train_method(tmp_path / "out", method, bert, reviews, "--steps", 60, "--dtype", dtype)
    assert result["after"]["loss"] < result["before"]["loss"]


def test_the_saved_model_gives_the_same_predictions(bert, reviews, tmp_path):
    result = train_method(tmp_path / "out", "full", bert, reviews, "--steps", 30)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:6]
    for line in lines:
        text, _, predicted, *logits = line.split(",")
        with torch.no_grad():
            found = model(**tokenizer([text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(
            found, torch.tensor(list(map(float, logits))), rtol=1e-4, atol=1e-4
        )
        assert model.config.id2label[found.argmax().item()] == predicted
    assert result["weight_update"] is None


def test_a_model_without_biases_has_no_bitfit(llama, reviews, tmp_path, capsys):
    words = [llama, reviews, "--method", "bitfit", "--output", tmp_path / "out"]
    assert finetune(*words) == 2
    assert "method: got bitfit, of whose parameters this model has none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
