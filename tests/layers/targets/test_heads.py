"""Heads: new ones are found and trained whole, pretrained ones are left alone."""

import pytest
import torch
import transformers
from torch import nn

from deltadiff import swap_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.targets.heads import find_heads

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_labels": 3,
}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4}
GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2}
T5 = {"vocab_size": 20, "d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "tie_word_embeddings": False,
}  # fmt: skip
SPEECH = {
    **SIZES, "conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def build(name: str, **options) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options))


NEW = [
    ("BertForSequenceClassification", SIZES, {"classifier"}),
    ("BertForTokenClassification", SIZES, {"classifier"}),
    ("BertForQuestionAnswering", SIZES, {"qa_outputs"}),
    ("BertForMultipleChoice", SIZES, {"classifier"}),
    ("RobertaForSequenceClassification", SIZES, {"classifier"}),
    ("DebertaV2ForSequenceClassification", SIZES, {"pooler", "classifier"}),
    ("LlamaForSequenceClassification", SIZES, {"score"}),
    ("GPT2ForSequenceClassification", GPT2, {"score"}),
    ("GPT2DoubleHeadsModel", GPT2, {"multiple_choice_head"}),
    ("T5ForQuestionAnswering", T5, {"qa_outputs"}),
    ("ViTForImageClassification", {**SIZES, **IMAGE}, {"classifier"}),
    ("Wav2Vec2ForSequenceClassification", SPEECH, {"projector", "classifier"}),
    ("Wav2Vec2ForCTC", SPEECH, {"lm_head"}),
    ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
     {"classifier"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "heads"), NEW)
def test_new_heads_are_found(name, options, heads):
    assert set(find_heads(build(name, **options)).new) == heads


@pytest.mark.parametrize(("name", "options", "heads"), [c for c in NEW if "ResNet" not in c[0]])
def test_new_heads_train_whole_and_get_no_pair(name, options, heads):
    model = build(name, **options)
    report = swap_(model, r=1)
    for n, p in model.named_parameters():
        in_head = n.split(".")[0] in heads
        assert p.requires_grad == (in_head or "lora_" in n), n
    assert not any(n.split(".")[0] in heads for n in lora_layers(model))
    assert {g.name for g in report.coverage.whole} == heads
    assert all(f"{head} (a new head)" in str(report) for head in heads)


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("BertForMaskedLM", SIZES, {"cls.predictions.transform.dense"}),
        ("BertForPreTraining", SIZES, {"cls.predictions.transform.dense", "cls.seq_relationship"}),
        ("BertForNextSentencePrediction", SIZES, {"cls.seq_relationship"}),
        ("DistilBertForMaskedLM", {"vocab_size": 20, "dim": 16, "n_heads": 2, "hidden_dim": 16,
                                   "n_layers": 1}, {"vocab_transform"}),
        ("LlamaForCausalLM", SIZES, {"lm_head"}),
        ("BartForConditionalGeneration", BART, {"lm_head"}),
    ],
)  # fmt: skip
def test_pretrained_heads_are_neither_trained_nor_get_a_pair(name, options, left):
    model = build(name, **options)
    report = swap_(model, r=1)
    assert not find_heads(model).new and not report.coverage.whole
    assert not left & set(lora_layers(model))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    reasons = {g.name: g.reason for g in report.coverage.left_out}
    assert all(reasons[n] in ("part of a pretrained head", "the output head") for n in left)


def test_a_pooler_inside_the_body_is_an_ordinary_layer():
    model = build("BertForSequenceClassification", **SIZES)
    swap_(model, r=1)
    assert "bert.pooler.dense" in lora_layers(model)


def test_a_head_beside_one_of_transformers_models():
    """A class of one's own, or TRL's value head."""
    model = nn.Module()
    model.body, model.classifier = build("BertModel", **SIZES), nn.Linear(16, 3)
    model.other = nn.Linear(16, 4)
    assert set(find_heads(model).new) == {"classifier"}
    wrapped = nn.ModuleDict({"module": build("BertForSequenceClassification", **SIZES)})
    assert set(find_heads(wrapped).new) == {"module.classifier"}


def test_a_head_that_the_body_holds_too():
    """Detection models refine boxes with their heads inside of the decoder."""
    model = build("BertForSequenceClassification", **SIZES)
    model.bert.encoder.again = model.classifier
    swap_(model, r=1)
    assert type(model.classifier) is nn.Linear and model.classifier.weight.requires_grad


def test_a_head_that_is_named_keeps_its_meaning_and_the_report_says_so():
    model = build("BertForSequenceClassification", **SIZES)
    report = swap_(model, r=1, target_modules=["query", "classifier"])
    assert not model.classifier.weight.requires_grad and model.classifier.lora_A.requires_grad
    assert report.coverage.paired_heads == ("classifier",)
    assert "a new head trains a pair alone: classifier; modules_to_save=['classifier']" in str(
        report
    )


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["pooler"]},
        {"target_modules": lambda name, module: name.endswith("query")},
    ],
)
def test_a_head_that_stays_frozen_is_said(options):
    model = build("BertForSequenceClassification", **SIZES)
    report = swap_(model, r=1, **options)
    assert not model.classifier.weight.requires_grad
    assert model.bert.pooler.dense.weight.requires_grad == ("modules_to_save" in options)
    assert report.coverage.frozen_heads == ("classifier",)
    assert "a new head is frozen: classifier; modules_to_save=['classifier'] trains" in str(report)


def test_names_leave_the_head_trained():
    model = build("RobertaForSequenceClassification", **SIZES)
    swap_(model, r=1, target_modules=["query", "value"])
    assert all(p.requires_grad for p in model.classifier.parameters())
    model = build("RobertaForSequenceClassification", **SIZES)
    swap_(model, r=1, target_modules=["dense"])  # also one of the head's two layers
    assert model.classifier.out_proj.weight.requires_grad
    assert not model.classifier.dense.weight.requires_grad


def test_a_new_head_learns():
    torch.manual_seed(0)
    model = build("BertForSequenceClassification", **SIZES).train()
    swap_(model, r=1)
    model(torch.arange(6)[None], labels=torch.tensor([1])).loss.backward()
    assert model.classifier.weight.grad.any() and model.classifier.bias.grad.any()
