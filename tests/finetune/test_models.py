"""Where models are found, and how they are loaded for a task."""

import pytest
import torch

from deltadiff.errors import ArgumentError
from deltadiff.finetune.models import find_model, load_model
from deltadiff.finetune.tasks.classes import ClassTask
from deltadiff.finetune.tasks.spans import SpanTask

transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]


@pytest.mark.parametrize("name", ["no_such_package", "no/such/folder", "json", ""])
def test_no_model_there(name):
    with pytest.raises(ArgumentError, match="config.json"):
        find_model(name)


def test_a_garbled_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", ')
    with pytest.raises(ArgumentError, match="transformers can load"):
        load_model(str(tmp_path), ClassTask(("a", "b")))


def test_a_model_of_an_unknown_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no such type"}')
    with pytest.raises(ArgumentError, match="model"):
        load_model(str(tmp_path), ClassTask(("a", "b")))


def test_the_model_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    (package / "pooling").mkdir(parents=True)
    (package / "weights").mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "pooling" / "config.json").write_text("{}")
    (package / "weights" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("some-model") == package / "weights"


def test_the_head_is_the_same_every_time(bert):
    first, second = (load_model(bert, ClassTask(("a", "b")), seed=7) for _ in range(2))
    assert first.head == ("classifier",)
    assert torch.equal(first.module.classifier.weight, second.module.classifier.weight)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_body_is_the_pre_trained_one(name, request):
    folder = request.getfixturevalue(name)
    module = load_model(folder, SpanTask()).module
    body = getattr(module, module.base_model_prefix).state_dict()
    trained = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert len(body) >= 20 and all(torch.equal(p, trained[n]) for n, p in body.items())
