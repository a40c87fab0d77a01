"""Answers that are spans of a text, as in SQuAD: windows, loss, and what was found.

A text that is too long for the model is cut into windows that overlap. A model gives each token of
a window two logits, to be the first and to be the last one of the answer. Position 0, which is
never in the text, stands for "not in this window".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..errors import ArgumentError
from .data import Encoded, Example
from .models import Model

MOST_TOKENS = 30  # of an answer


LOSS, FIRST, LAST, SCORE, NONE, COLUMNS = range(6)  # of what `best` gives


@dataclass
class Windows(Encoded):
    """Windows of examples; the label of each is (first, last) token of its answer, or (0, 0).

    Attributes:
        owners: the example of each window.
        offsets: (tokens, 2) int32 of each window, where a token of the text starts and ends in it;
            (0, 0) for other tokens.
    """

    examples: Sequence[Example]
    owners: list[int]
    offsets: list[Tensor]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """As `Encoded.batch`; "context" says which tokens are of the text."""
        found = super().batch(indices, device)
        context = torch.zeros(found["input_ids"].shape, dtype=torch.bool)
        for row, i in enumerate(indices):
            context[row, : len(self.offsets[i])] = self.offsets[i][:, 1] > 0
        return found | {"context": context.to(device, non_blocking=True)}


def encode(examples: Sequence[Example], model: Model, max_length: int, doc_stride: int) -> Windows:
    """Question and text of each example, in windows of at most ``max_length`` tokens.

    Neighbouring windows share ``doc_stride`` tokens of the text. Of several answers the first is
    learnt, where it is whole in a window.

    Raises:
        ArgumentError: an example without question and answers; a tokenizer that does not tell where
            its tokens stand; questions that leave no room for a text.
    """
    tokenizer = model.tokenizer
    if any(e.answers is None for e in examples):
        raise ArgumentError("heldout", "text without answers", "questions, as in training")
    if not tokenizer.is_fast:
        given = f"{type(tokenizer).__name__}, which does not tell where a token stands"
        raise ArgumentError("model", given, "a model with a fast tokenizer")
    questions, texts = [e.prompt for e in examples], [e.text for e in examples]
    asked = max(map(len, tokenizer(questions, add_special_tokens=False)["input_ids"]))
    least = asked + tokenizer.num_special_tokens_to_add(pair=True) + doc_stride + 1
    if max_length < least:
        accepted = f"at least {least}: a question has {asked} tokens, windows share {doc_stride}"
        raise ArgumentError("max_length", max_length, accepted)
    found = tokenizer(
        questions, texts, truncation="only_second", max_length=max_length, stride=doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    owners, offsets = found["overflow_to_sample_mapping"], []
    for i, pairs in enumerate(found["offset_mapping"]):
        window = torch.tensor(pairs, dtype=torch.int32)
        if i == 0 or owners[i] != owners[i - 1]:
            # Windows of an example begin and end alike; tokenizers 0.22 tells of the first only.
            parts = found.sequence_ids(i)
            before, after = parts.index(1), parts[::-1].index(1)
        window[:before] = window[len(window) - after :] = 0
        offsets.append(window)
    labels = [
        _label(examples[o].answers, window) for o, window in zip(owners, offsets, strict=True)
    ]
    return Windows(found["input_ids"], labels, tokenizer.pad_token_id, examples, owners, offsets)


def _label(answers: Sequence[tuple[str, int]], offsets: Tensor) -> tuple[int, int]:
    if not answers:
        return 0, 0
    text, start = answers[0]
    end = start + len(text)
    firsts, lasts = offsets.unbind(1)
    tokens = ((lasts > start) & (firsts < end)).nonzero().flatten().tolist()
    whole = tokens and firsts[tokens[0]] <= start and lasts[tokens[-1]] >= end
    return (tokens[0], tokens[-1]) if whole else (0, 0)


def loss(logits: Tensor, labels: Tensor, reduction: str, label_smoothing: float) -> Tensor:
    """Mean of the cross entropies of first and last token.

    ``logits`` (windows, tokens, 2), ``labels`` (windows, 2).
    """
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    return sum(cross_entropy(logits[..., i], labels[:, i], **options) for i in (0, 1)) / 2


def best(losses: Tensor, logits: Tensor, context: Tensor) -> Tensor:
    """(windows, COLUMNS): loss, the best span of the text, its score, and that of no answer.

    A score is the sum of two logits. ``context`` (windows, tokens): which tokens are of the text.
    """
    first, last = logits.unbind(-1)
    tokens = first.shape[1]
    places = torch.arange(tokens, device=logits.device)
    length = places[None, :] - places[:, None]  # minus 1
    allowed = (length >= 0) & (length < MOST_TOKENS)
    allowed = allowed & context[:, :, None] & context[:, None, :]
    scores = (first[:, :, None] + last[:, None, :]).masked_fill(~allowed, -torch.inf)
    score, at = scores.flatten(1).max(1)
    return torch.stack([losses, at // tokens, at % tokens, score, first[:, 0] + last[:, 0]], dim=1)


def answers(rows: Tensor, data: Windows) -> list[str]:
    """The answer to each example, from its windows' rows of `best`.

    That is the best span of all windows; "" where no answer scores more in each of them, which is
    only asked where some example has none.
    """
    may_miss = any(not e.answers for e in data.examples)
    found = [(-torch.inf, "")] * len(data.examples)
    missing = [torch.inf] * len(data.examples)
    for owner, offsets, row in zip(data.owners, data.offsets, rows.tolist(), strict=True):
        missing[owner] = min(missing[owner], row[NONE])
        if row[SCORE] > found[owner][0]:
            start, end = offsets[int(row[FIRST]), 0], offsets[int(row[LAST]), 1]
            found[owner] = row[SCORE], data.examples[owner].text[start:end].strip()
    return [
        "" if may_miss and none > score else text
        for (score, text), none in zip(found, missing, strict=True)
    ]
