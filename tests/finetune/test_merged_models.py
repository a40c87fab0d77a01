"""What a merged model keeps of its base and of the run that trained it."""

import csv
import json
import shutil
from pathlib import Path

import finetune_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltadiff import save_adapter, swap_
from deltadiff.__main__ import main

transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]


@pytest.fixture(scope="module")
def numbered(reviews, tmp_path_factory) -> str:
    """The reviews with a number each."""
    path = tmp_path_factory.mktemp("data") / "numbers.csv"
    text = Path(reviews).read_text().replace(",fun", ",1.5").replace(",dull", ",-1")
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("name", "dtype"), [("bert", "bfloat16"), ("llama", "float16")])
def test_a_classifier_keeps_its_classes(name, dtype, request, reviews, tmp_path, capsys):
    folder = as_dtype(request.getfixturevalue(name), tmp_path / "base", dtype)
    words = ["--steps", "3", "--dtype", dtype]
    result = finetune_runs.train(folder, reviews, tmp_path / "out", *words)
    adapter, merged = tmp_path / "out" / "adapter", tmp_path / "merged"
    assert main(["merge", str(folder), str(adapter), str(merged)]) == 0
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(merged, dtype="auto")
    assert model.config.id2label == {0: "dull", 1: "fun"}
    assert model.config.label2id == {"dull": 0, "fun": 1}
    assert model.config.problem_type == "single_label_classification"
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.pad_token_id == 0 and "called" not in capsys.readouterr().out
    tokenizer = load_tokenizer(merged)
    assert tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = 0
    for row in rows:
        with torch.no_grad():
            found = model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax().item()
        right += model.config.id2label[found] == row["predicted"]
    assert right >= len(rows) - 1  # 16 bits round the merged weight
    assert len(rows) == result["examples"]["heldout"]


def test_a_regression_stays_one(bert, numbered, tmp_path):
    words = ["--steps", "2", "--regression"]
    finetune_runs.train(bert, numbered, tmp_path / "out", *words)
    assert main(["merge", bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]) == 0
    kind = transformers.AutoModelForSequenceClassification
    config = kind.from_pretrained(tmp_path / "merged").config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_a_base_with_classes_of_its_own_keeps_them(bert, tmp_path, capsys):
    """Nothing tells what the outputs of an adapter by `save_adapter` mean but the base's config."""
    names = {0: "no", 1: "maybe", 2: "yes"}
    kind, folder, headless = (
        transformers.BertForSequenceClassification, tmp_path / "base", tmp_path / "headless",
    )  # fmt: skip
    options = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    kind.from_pretrained(bert, **options).save_pretrained(folder)
    transformers.BertModel.from_pretrained(folder).save_pretrained(headless)
    adapter = save_some_adapter(
        kind.from_pretrained(folder), tmp_path, modules_to_save=["classifier"]
    )
    merged = tmp_path / "merged"
    for base, told in ((folder, False), (headless, True)):
        capsys.readouterr()
        assert main(["merge", str(base), adapter, str(merged / base.name)]) == 0
        assert kind.from_pretrained(merged / base.name).config.id2label == names
        text = "the adapter does not name its 3 classes; they are called no, maybe, yes in config"
        assert (text in capsys.readouterr().out) == told


def test_generation_and_all_files_of_the_tokenizer_are_kept(llama, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(llama, base)
    kept = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7], "max_length": 99}
    (base / "generation_config.json").write_text(json.dumps(kept))
    (base / "additional_chat_templates").mkdir()
    others = ["additional_chat_templates/rag.jinja", "chat_template.jinja", "tokenization_own.py"]
    others += ["special_tokens_map.json", "qwen.tiktoken", "preprocessor_config.json"]
    for name in others:
        (base / name).write_text(f"{{# {name} #}}")
    adapter = save_some_adapter(transformers.LlamaForCausalLM.from_pretrained(base), tmp_path)
    assert main(["merge", str(base), adapter, str(merged)]) == 0
    found = json.loads((merged / "generation_config.json").read_text())
    assert kept.items() <= found.items()
    for name in others:
        assert (merged / name).read_text() == f"{{# {name} #}}"


def test_a_base_without_a_tokenizer(llama, tmp_path, capsys):
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "base")
    adapter = save_some_adapter(model, tmp_path)
    assert main(["merge", str(tmp_path / "base"), adapter, str(tmp_path / "merged")]) == 0
    assert "has no tokenizer, and so the merged model has none" in capsys.readouterr().out


def save_some_adapter(model, folder: Path, **options) -> str:
    """The folder of an adapter for a model."""
    swap_(model, r=2, seed=0, **options)
    save_adapter(model, folder / "adapter")
    return str(folder / "adapter")


def as_dtype(source: str, folder: Path, dtype: str) -> Path:
    """A copy of a model whose weights have this dtype, which its config does not tell."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "dtype"})
    )
    return folder


def load_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
