"""The methods of other libraries: what they train, and what they say if they cannot."""

import sys

import pytest
import torch
from finetune_runs import prepare, trained_names

from deltadiff.errors import ArgumentError

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTERS = ("houlsby", "pfeiffer")


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_say_why_not(method, bert, reviews, monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters", None)
    with pytest.raises(ArgumentError, match=f"method: got {method}: adapters") as caught:
        prepare(method, bert, reviews)
    assert "/" not in caught.value.given  # no path


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_train_and_generate(method, bert, llama, reviews):
    pytest.importorskip("adapters", exc_type=ImportError)
    _, prepared = prepare(method, bert, reviews)
    names = trained_names(prepared.module)
    assert names == {n for n in names if ".adapters." in n or n.startswith("classifier.")}
    places = {n.partition(".adapters.")[0] for n in names if ".adapters." in n}
    assert len(places) == 2 * (2 if method == "houlsby" else 1)  # of 2 blocks

    task, prepared = prepare(method, llama, reviews, label_column=None)
    module = prepared.module.eval()
    given = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    found = module.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)[0]
    for n in range(3, len(found)):  # the same token as without a cache
        logits = module(input_ids=found[None, :n]).logits
        assert found[n] == logits[0, -1].argmax()
    assert len(found) == 8


def test_peft_says_how_to_install_it(bert, reviews, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ArgumentError, match="method: got nothing .*: pip install peft"):
        prepare("lora-peft", bert, reviews)
