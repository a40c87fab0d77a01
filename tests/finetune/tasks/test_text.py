"""Text: what of it has a loss, and its metrics by hand."""

import math

import pytest
import torch
from character_tokenizer import CharacterTokenizer

from deltadiff.errors import ArgumentError
from deltadiff.finetune.batches import IGNORED
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.tasks.text import EncodedText, TextTask


def test_prompts_have_no_loss():
    examples = [Example("yz", prompt="p"), Example("abcdef", prompt="p")]
    data = TextTask().encode(examples, CharacterTokenizer(), max_length=6)
    p, n, y, z, a, b, c, d = map(ord, "p\nyzabcd")
    assert data.ids == [[p, n, y, z, 1], [p, n, a, b, c, d]]
    assert data.labels == [[IGNORED, IGNORED, y, z, 1], [IGNORED, IGNORED, a, b, c, d]]
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[p, n, y, z, 1, 0], data.ids[1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["labels"].tolist() == [data.labels[0] + [IGNORED], data.labels[1]]


def test_nothing_left_to_learn():
    with pytest.raises(ArgumentError, match="max_length"):
        TextTask().encode([Example("x", prompt="long")], CharacterTokenizer(), max_length=5)


def test_tokens():
    rows = torch.tensor([[2.0, 1.0], [4.0, 3.0]])  # (negative log-likelihood, tokens)
    found, _ = TextTask().score(rows, EncodedText([[0], [0]], [[0], [0]], 0, ()))
    assert found == pytest.approx({"nll_per_token": 1.5, "perplexity": math.exp(1.5)})
