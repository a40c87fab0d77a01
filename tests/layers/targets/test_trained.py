"""What `swap_` lets train beside the pairs."""

import pytest
import torch
import transformers
from small_models import build
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError


def tied() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_trains_under_either_of_its_names(name, tmp_path):
    model, ids = tied(), torch.arange(8)[None]
    report = swap_(model, r=2, modules_to_save=[name])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "trained whole" in str(report) and "model.embed_tokens with lm_head" in str(report)
    optimizer, before = DeltaLoRA(model, lr=1e-2), model.lm_head.weight.detach().clone()
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.lm_head.weight, before)
    save_adapter(model, tmp_path)
    load_adapter(fresh := tied(), tmp_path)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight
    assert torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    logits = model(ids).logits
    merge_(model)
    torch.testing.assert_close(model(ids).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_module_in_two_places_is_found_by_both_names():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    model["second"] = model["first"]
    swap_(model, r=1, modules_to_save=["second"])
    assert model["first"].weight.requires_grad


def test_what_cannot_be_trained_is_refused():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "drop": nn.Dropout(), "q": nn.Linear(4, 4)})
    model["q"].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    for name, error, words in (
        ("drop", ArgumentError, "drop, a Dropout without parameters"),
        ("q", ArgumentTypeError, "q, which holds int8 weights"),
    ):
        with pytest.raises(error, match=f"modules_to_save: got {words}"):
            swap_(model, r=1, modules_to_save=[name])
    assert type(model["body"]) is nn.Linear and model["body"].weight.requires_grad


def test_a_second_call_goes_on_training_what_the_first_did():
    model = build("bert")
    swap_(model, r=2, target_modules=["query"], modules_to_save=["pooler"])
    swap_(model, r=2, target_modules=["value"])
    assert model.bert.pooler.dense.weight.requires_grad and model.classifier.weight.requires_grad
    swap_(model, r=2, target_modules=["classifier"])
    assert not model.classifier.weight.requires_grad and model.classifier.lora_B.requires_grad
    unswap_(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_lazy_layer_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    swap_(model, r=1)
    assert model(torch.randn(3, 4)).shape == (3, 2) and not model[1].weight.requires_grad
    unswap_(model)
    assert model[1].weight.requires_grad
