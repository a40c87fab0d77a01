"""`--adapter-format peft`: PEFT loads the result, and computes what the run measured."""

import csv
import json

import pytest
import torch
from finetune_runs import finetune, stop_at, train

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError
from deltadiff.finetune import training
from deltadiff.finetune.methods import fused

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = {
    "lora": ["--use-rslora"], "lora-peft": [], "adalora": [], "dylora": [], "flora": [],
    "delta-lora": [],
    "diffora-delta-lora": ["--search-rounds", "1", "--inner-steps", "1"],
}  # fmt: skip


@pytest.mark.parametrize("method", WORDS)
def test_peft_computes_what_was_measured(method, bert, reviews, tmp_path):
    words = ["--method", method, "--adapter-format", "peft", "--steps", "6", *WORDS[method]]
    train(bert, reviews, tmp_path / "out", *words)
    adapter = tmp_path / "out" / "adapter"
    names = {path.name for path in adapter.iterdir()} - {"README.md"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "task.json"}
    kind = transformers.AutoModelForSequenceClassification
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(bert, num_labels=2), adapter).eval()
    assert_predicts(model, bert, tmp_path / "out")


def test_it_is_merged_with_its_classes(bert, reviews, tmp_path):
    train(bert, reviews, tmp_path / "out", "--adapter-format", "peft", "--steps", "6")
    words = [bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "dull", 1: "fun"}
    assert_predicts(model, bert, tmp_path / "out")


def test_a_run_is_resumed(bert, reviews, tmp_path, monkeypatch):
    """Its checkpoints are in deltadiff's format, which has the state of Delta-LoRA."""
    words = ["--adapter-format", "peft", "--steps", "8", "--label-column", "label"]
    words += ["--lr", "0.01", "--start-step", "3", "--device", "cpu", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, training, 6)
        assert finetune(bert, reviews, *words) == 130
    assert finetune("--resume", tmp_path / "out") == 0
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists()
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["adapter_format"] == "peft"


def test_what_peft_cannot_hold_is_not_lost(bert, reviews, tmp_path, monkeypatch, capsys):
    def refuse(module, folder):
        raise ArgumentError("layer", "something", "something else")

    monkeypatch.setattr(fused, "export_peft", refuse)
    words = ["--adapter-format", "peft", "--steps", "2", "--label-column", "label"]
    assert finetune(bert, reviews, *words, "--output", tmp_path / "out") == 1
    told = capsys.readouterr().out
    adapter = tmp_path / "out" / "adapter"
    assert "adapter_format failed: not 'peft' (layer: got something; accepted: something " in told
    assert "the adapter is in deltadiff's" in told and "after:  accuracy" in told
    assert (adapter / "adapter.json").exists()


@torch.no_grad()
def assert_predicts(model, base: str, output) -> None:
    """The model gives the logits of predictions.csv."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        found = model.eval()(**tokenizer(row["text"], return_tensors="pt")).logits[0]
        saved = torch.tensor([float(row["logit dull"]), float(row["logit fun"])])
        torch.testing.assert_close(found, saved, rtol=1e-4, atol=1e-4)
    assert len(rows) == 40
