"""Texts and pairs of sentences as tokens, with the segments that tell the two apart."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest_plugins = ["tiny_models"]

from deltadiff.errors import ArgumentError  # noqa: E402
from deltadiff.finetune.data.examples import Example  # noqa: E402
from deltadiff.finetune.models import load_model  # noqa: E402
from deltadiff.finetune.tasks.classes import ClassTask  # noqa: E402
from deltadiff.finetune.tasks.spans import SpanTask  # noqa: E402

TASK = ClassTask(("no", "yes"))
PAIRS = [
    Example("is great", "yes", prompt="the film", place="p"),
    Example("dull", "no", prompt="a"),
]


def encode(model: str, examples, task=TASK, max_length=16):
    loaded = load_model(model, task)
    return loaded, task.encode(examples, loaded.tokenizer, max_length)


@pytest.fixture(scope="module")
def gpt2(bert, tmp_path_factory) -> str:
    """A model that takes token_type_ids for ids of words, as GPT-2 does."""
    import shutil

    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=23, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=2
    )
    transformers.GPT2Model(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{bert}/{name}", folder)
    return str(folder)


def test_pairs_have_segments(bert):
    loaded, data = encode(bert, PAIRS)
    the, film, is_, great, a, dull = loaded.tokenizer.convert_tokens_to_ids(
        ["the", "film", "is", "great", "a", "dull"]
    )
    assert data.ids == [[the, film, is_, great], [a, dull]]
    assert data.segments == [[0, 0, 1, 1], [0, 1]] and data.labels == [1, 0]
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_the_model_gets_the_segments(bert):
    from deltadiff.finetune.runner import ModelRunner

    loaded, data = encode(bert, PAIRS)
    runner = ModelRunner(loaded.module.eval(), TASK, torch.device("cpu"), torch.float32)
    batch = data.batch([0, 1], torch.device("cpu"))
    found = runner.loss(batch)[1]
    names = ("input_ids", "attention_mask", "token_type_ids")
    expected = loaded.module(**{name: batch[name] for name in names}).logits
    assert torch.equal(found, expected)
    del batch["token_type_ids"]
    assert not torch.allclose(runner.loss(batch)[1], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_models_without_segments_get_none(name, request):
    _, data = encode(request.getfixturevalue(name), PAIRS)
    assert data.segments is None and "token_type_ids" not in data.batch([0], torch.device("cpu"))


def test_questions_have_segments_too(bert):
    asked = Example("the film is great", prompt="film is", answers=(("great", 12),))
    _, data = encode(bert, [asked], SpanTask(1), 5)
    assert data.segments == [[0, 0, 1, 1, 1], [0, 0, 1, 1]]


def test_texts_that_are_cut_are_counted(bert):
    examples = [Example("the film is great", "yes"), Example("a film", "no")]
    _, data = encode(bert, examples, max_length=3)
    assert data.cut == 1 and [len(row) for row in data.ids] == [3, 2]
    assert encode(bert, examples)[1].cut == 0


@pytest.mark.parametrize("task", [TASK, SpanTask(1)])
def test_a_text_without_tokens_is_skipped(bert, task):
    answers = () if isinstance(task, SpanTask) else None
    empty = Example("\u200b \x00", "no", answers=answers, place="a.csv, line 3")
    whole = Example("a film", "yes", answers=answers)
    loaded = load_model(bert, task)
    loaded.tokenizer.backend_tokenizer.normalizer = blank_normalizer()
    data = task.encode([empty, whole, empty], loaded.tokenizer, 8)
    assert data.examples == [whole] and len(data) == 1
    assert str(data.skipped) == "2 without a token (first: a.csv, line 3)"
    with pytest.raises(ArgumentError, match="nothing is left: 1 without a token"):
        task.encode([empty], loaded.tokenizer, 8)


def blank_normalizer():
    """It removes what has no glyph, as BERT's does."""
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(r"[\u200b\x00]"), "")


def test_no_room_for_a_text(bert):
    from tokenizers.processors import TemplateProcessing

    loaded = load_model(bert, TASK)
    loaded.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[END] $A", pair="[END] $A [END] $B:1", special_tokens=[("[END]", 2)]
    )
    assert len(TASK.encode(PAIRS, loaded.tokenizer, 4)) == 2
    with pytest.raises(ArgumentError, match="max_length: got 3; accepted: at least 4"):
        TASK.encode(PAIRS, loaded.tokenizer, 3)
    alone = [Example("a film", "no")]
    assert len(TASK.encode(alone, loaded.tokenizer, 2)) == 1
    with pytest.raises(ArgumentError, match="max_length: got 1; accepted: at least 2"):
        TASK.encode(alone, loaded.tokenizer, 1)


def test_a_label_that_training_has_not(bert):
    with pytest.raises(ArgumentError, match="label: got 'maybe' in a.csv, line 9"):
        encode(bert, [Example("a film", "maybe", place="a.csv, line 9")])
