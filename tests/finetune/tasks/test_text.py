"""Text: what of it has a loss, and its metrics by hand."""

import math

import pytest
import torch
from character_tokenizer import CharacterTokenizer

from deltadiff.errors import ArgumentError
from deltadiff.finetune.batches import IGNORED
from deltadiff.finetune.data.conversations import read_messages
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.tasks.text import EncodedText, TextTask, prompt_tokens


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


def test_a_text_of_which_nothing_is_left_is_skipped():
    """Alone in a batch it would have no loss at all, which is NaN."""
    place = "a.csv, line 3"
    examples = [Example("x", prompt="long", place=place), Example("y"), Example("z", prompt="long")]
    data = TextTask().encode(examples, CharacterTokenizer(), max_length=5)
    assert data.examples == examples[1:2] and data.ids == [[ord("y"), 1]] and data.cut == 0
    told = "2 with nothing to learn in its first 5 tokens (first: a.csv, line 3)"
    assert str(data.skipped) == told
    with pytest.raises(ArgumentError, match="max_length: got 5; skipped: 1 with nothing to learn"):
        TextTask().encode(examples[:1], CharacterTokenizer(), max_length=5)


def test_a_text_of_one_token_has_nothing_to_learn():
    class NoEnd(CharacterTokenizer):
        eos_token_id = None

    data = TextTask().encode([Example("x"), Example("ab")], NoEnd(), max_length=5)
    assert data.ids == [list(map(ord, "ab"))]
    assert data.skipped.counts == {"with nothing to learn": 1}


def test_texts_that_are_cut_are_counted():
    data = TextTask().encode([Example("abcdef"), Example("abcd")], CharacterTokenizer(), 5)
    assert data.cut == 1 and data.counted([0, 1]) == 8


def test_conversations_are_rows_of_text():
    pytest.importorskip("transformers")
    from chat_tokenizers import CHATML, byte_tokenizer

    tokenizer, place = byte_tokenizer(CHATML), "a.jsonl, line 1"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = read_messages(messages, None, place)
    long = read_messages([{"role": "user", "content": "a" * 30}, messages[1]], None, place)
    examples = [Example("b", conversation=c, place=place) for c in (chat, long)]
    data = TextTask().encode(examples, tokenizer, max_length=32)
    assert data.examples == examples[:1]
    prompt = "<|start|>user\na<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(data.ids[0]) == f"{prompt}b<|end|>\n"
    assert tokenizer.decode([t for t in data.labels[0] if t != IGNORED]) == "b<|end|>"
    assert data.skipped.counts == {"with nothing to learn in its first 32 tokens": 1}
    assert prompt_tokens(tokenizer, examples)[0] == data.ids[0][:-3]


def test_tokens():
    rows = torch.tensor([[2.0, 1.0], [4.0, 3.0]])  # (negative log-likelihood, tokens)
    found, _ = TextTask().score(rows, EncodedText([[0], [0]], [[0], [0]], 0, ()))
    assert found == pytest.approx({"nll_per_token": 1.5, "perplexity": math.exp(1.5)})
