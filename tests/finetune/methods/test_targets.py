"""The layers that `--target-modules` names."""

import pytest
import torch
from finetune_runs import prepare

from deltadiff.errors import ArgumentError
from deltadiff.finetune.methods.targets import query_value
from deltadiff.layers.lora_layers import lora_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_qv_names_the_layers_of_attention(bert, llama):
    names = query_value(transformers.AutoModel.from_pretrained(bert))
    assert [n.rpartition(".")[2] for n in names] == ["query", "value"] * 2
    names = query_value(transformers.AutoModelForCausalLM.from_pretrained(llama))
    assert [n.rpartition(".")[2] for n in names] == ["q_proj", "v_proj"] * 2
    with pytest.raises(ArgumentError, match="target_modules: got qv"):
        query_value(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_qv_as_target_modules(bert, reviews):
    _, prepared = prepare("lora", bert, reviews, target_modules="qv")
    assert len(lora_layers(prepared.module)) == 4
