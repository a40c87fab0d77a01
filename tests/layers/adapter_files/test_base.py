"""An adapter on other forms of its base model: stored otherwise, with another head, more tokens."""

import copy

import peft
import pytest
import torch
from quantised_layers import Int8Linear, PackedLinear, dequantised
from small_models import build
from torch import nn
from trained_adapters import base, trained
from transformers import BertModel
from transformers.pytorch_utils import Conv1D
from version_1_adapters import save_version_1

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, CheckpointError, SwapError
from deltadiff.layers.adapter_files import base as adapter_base
from deltadiff.layers.adapter_files.format import read_adapter_config
from deltadiff.layers.lora_layers import lora_layers

# ------------------------------------------------------- weights that are stored otherwise


def network(kind, dtype=torch.float32):
    """A network whose first layer is of this kind, and the dense one that computes the same."""
    torch.manual_seed(0)
    first, last = nn.Linear(8, 6), nn.Linear(6, 4)
    if kind is Conv1D:
        turned = Conv1D(6, 8)
        with torch.no_grad():
            turned.weight.copy_(first.weight.T)
            turned.bias.copy_(first.bias)
        return nn.Sequential(turned, nn.Tanh(), last), nn.Sequential(first, nn.Tanh(), last)
    stored = first if kind is nn.Linear else kind(first)
    return nn.Sequential(stored, nn.Tanh(), last), nn.Sequential(
        dequantised(stored).to(dtype), nn.Tanh(), copy.deepcopy(last).to(dtype)
    )


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Int8Linear, PackedLinear, Conv1D])
def test_an_adapter_fits_however_the_weight_is_stored(tmp_path, kind, back):
    first, second = network(kind)[:: -1 if back else 1]
    second = copy.deepcopy(second)
    swap_(first, r=2, target_modules=["0"], modules_to_save=["2"], seed=0)
    optimizer = DeltaLoRA(first, lr=1e-2, update_ratio=0.5, w_update="factored")
    x = torch.randn(5, 8)
    for _ in range(4):
        optimizer.zero_grad()
        first(x).square().mean().backward()
        optimizer.step()
    save_adapter(first, tmp_path)
    assert read_adapter_config(tmp_path)["base"]["0.weight"] == [6, 8]
    load_adapter(second, tmp_path)
    torch.testing.assert_close(second(x), first(x), atol=1e-5, rtol=0)


def test_trained_on_bytes_loaded_on_bfloat16_and_merged(tmp_path):
    first, second = network(PackedLinear, torch.bfloat16)
    swap_(first, r=2, target_modules=["0"], seed=0)
    nn.init.normal_(first[0].lora_B)
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    merge_(second)
    x = torch.randn(5, 8)
    y = first(x)
    assert (second(x.bfloat16()) - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("kind", [Int8Linear, PackedLinear, Conv1D])
def test_version_1_knew_stored_shapes(tmp_path, kind):
    first, second = network(kind)
    swap_(first, r=2, target_modules=["0"], modules_to_save=["2"], seed=0)
    nn.init.normal_(first[0].lora_B)
    save_version_1(first, tmp_path)
    load_adapter(second, tmp_path)
    x = torch.randn(5, 8)
    torch.testing.assert_close(second(x), first(x), atol=1e-5, rtol=0)


def test_version_1_saved_a_conv1d_as_it_lay(tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), Conv1D(6, 6))
    eager = copy.deepcopy(model)
    swap_(model, r=2, target_modules=["0"], modules_to_save=["1"])
    nn.init.normal_(model[1].weight)
    save_version_1(model, tmp_path)
    load_adapter(eager, tmp_path)
    assert torch.equal(eager[1].weight, model[1].weight)


# ------------------------------------------------------------- other heads, more tokens


def test_a_classifiers_adapter_on_the_encoder_alone(tmp_path):
    """transformers puts the encoder's name before those of its layers."""
    model = build("bert")
    swap_(model, r=2, target_modules=["query"], seed=0)
    model.classifier.requires_grad_(False)  # a head that was trained is in the file
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)
    encoder = BertModel(model.config).eval()
    encoder.load_state_dict(build("bert").bert.state_dict(), strict=False)
    save_adapter(model, tmp_path / "classifier")
    load_adapter(encoder, tmp_path / "classifier")
    ids = torch.arange(3, 9)[None]
    wanted = model.bert(ids).last_hidden_state
    assert torch.equal(encoder(ids).last_hidden_state, wanted)

    save_adapter(encoder, tmp_path / "encoder")  # and back
    fresh = build("bert")
    load_adapter(fresh, tmp_path / "encoder")
    assert torch.equal(fresh.bert(ids).last_hidden_state, wanted)


def test_a_trained_head_needs_its_place(tmp_path):
    model = build("bert")
    swap_(model, r=2, target_modules=["query"], modules_to_save=["classifier"])
    save_adapter(model, tmp_path)
    encoder = BertModel(model.config)
    with pytest.raises(CheckpointError, match=r"classifier.bias is \[2\] there; accepted: None"):
        load_adapter(encoder, tmp_path)
    other = build("bert")
    other.classifier = nn.Linear(16, 3)
    with pytest.raises(CheckpointError, match=r"classifier.bias is \[2\] there; accepted: \[3\]"):
        load_adapter(other, tmp_path)
    assert not lora_layers(encoder) and not lora_layers(other)


def test_more_tokens_matter_only_if_the_embedding_was_trained(tmp_path):
    model = build("llama")
    swap_(model, r=2, target_modules=["q_proj"])
    save_adapter(model, tmp_path / "frozen")
    model.get_input_embeddings().weight.requires_grad_(True)
    save_adapter(model, tmp_path / "trained")
    larger = build("llama")
    larger.resize_token_embeddings(48)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[40, 16\] there.*48, 16"):
        load_adapter(larger, tmp_path / "trained")
    load_adapter(larger, tmp_path / "frozen")
    assert len(lora_layers(larger)) == 3


def test_buffers_beside_trained_parameters_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    eager = copy.deepcopy(model)
    swap_(model, r=2, target_modules=["0"], modules_to_save=["1", "2"])
    model(torch.randn(32, 8) * 3 + 1)
    save_adapter(model, tmp_path)
    load_adapter(eager, tmp_path)
    x = torch.randn(4, 8)
    assert torch.equal(eager.eval()(x), model.eval()(x))


def test_a_tied_weight_that_was_trained_stays_tied(tmp_path):
    def tied(tie=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
        model[2].weight = model[0].weight if tie else nn.Parameter(model[0].weight.clone())
        return model

    model = tied()
    swap_(model, r=2, target_modules=["1"], modules_to_save=["0"])
    nn.init.normal_(model[0].weight)
    save_adapter(model, tmp_path)
    fresh = tied()
    load_adapter(fresh, tmp_path)
    x = torch.arange(6)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(CheckpointError, match="2.weight and 0.weight, which are one weight there"):
        load_adapter(tied(tie=False), tmp_path)


def test_a_trained_weight_does_not_go_into_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    swap_(model, r=2, target_modules=["0"], modules_to_save=["1"])
    save_adapter(model, tmp_path)
    other = nn.Sequential(nn.Linear(8, 8), Int8Linear(nn.Linear(8, 8)))
    with pytest.raises(CheckpointError, match="1.weight of torch.float32; accepted: torch.int8"):
        load_adapter(other, tmp_path)


# ------------------------------------------------------------------------------ refused


def test_layers_of_other_names_or_sizes_are_refused(tmp_path):
    model, _ = trained()
    save_adapter(model, tmp_path)
    wider = nn.Sequential(nn.Linear(12, 21), nn.Tanh(), nn.Linear(21, 4))
    named = nn.Sequential()
    named.first = nn.Linear(12, 20)
    bare = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 4))
    for other, words in (
        (wider, r"0.bias is \[20\] there; accepted: \[21\] as in this model \(3 weights differ\)"),
        (named, r"0.bias is \[20\] there; accepted: None as in this model"),
        (bare, r"0.bias is \[20\] there; accepted: None as in this model"),
    ):
        with pytest.raises(CheckpointError, match=f"an adapter for another base model: {words}"):
            load_adapter(other, tmp_path)
        assert not lora_layers(other) and all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("error", [MemoryError, ArgumentError("r", 2, "3")])
def test_a_swap_that_fails_halfway_is_taken_back(tmp_path, monkeypatch, error):
    model = base()
    swap_(model, r=3, target_modules=["0"])
    swap_(model, r=2, target_modules=["2"])
    save_adapter(model, tmp_path)
    calls = []

    def swap_once(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return swap_(*args, **options)

    monkeypatch.setattr(adapter_base, "swap_", swap_once)
    fresh = base()
    with pytest.raises((MemoryError, ArgumentError)):
        load_adapter(fresh, tmp_path)
    assert len(calls) == 2 and not lora_layers(fresh)
    assert all(p.requires_grad for p in fresh.parameters())


def test_what_is_no_plain_model_is_refused(tmp_path):
    model, _ = trained()
    save_adapter(model, tmp_path)
    wrapped = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(SwapError, match="a model with PEFT's layers"):
        load_adapter(wrapped, tmp_path)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ArgumentError, match="model: got str; accepted: a torch.nn.Module"):
            call("model", tmp_path)
