"""Questions with the texts that answer them, cut into windows that a model can take."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArgumentError
from ..batches import EncodedExamples
from ..data.examples import Example
from .labelled import NO_TOKENS


@dataclass
class Windows(EncodedExamples):
    """Windows of examples. Each is labelled with the first and the last token of its answer.

    Position 0, which is never in the text, stands for "not in this window": (0, 0).

    Attributes:
        owners: the example of each window, as its place in ``examples``.
        offsets: (tokens, 2) int32 of each window: where a token of the text starts and ends in it;
            (0, 0) for tokens that are not of the text.
    """

    owners: list[int]
    offsets: list[Tensor]

    def targets(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """ "context" (rows, tokens) says which tokens are of the text."""
        width = max(len(self.offsets[i]) for i in indices)
        context = torch.zeros((len(indices), width), dtype=torch.bool)
        for row, i in enumerate(indices):
            context[row, : len(self.offsets[i])] = self.offsets[i][:, 1] > 0
        return super().targets(indices) | {"context": context}


def cut_windows(
    examples: Sequence[Example], tokenizer, max_length: int, doc_stride: int
) -> Windows:
    """Question and text of each example, in windows of at most ``max_length`` tokens.

    Neighbouring windows share ``doc_stride`` tokens of the text. If a question has several answers,
    the first one is learnt. It is learnt from the windows that hold all of it.

    Raises:
        ArgumentError: an example has no question with answers; the tokenizer does not tell where
            its tokens stand; the questions leave no room for a text.
    """
    for e in examples:
        if e.answers is None:
            given = f"text without answers in {e.place}"
            raise ArgumentError("heldout", given, "questions, as in training")
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
    windows = Windows([], [], tokenizer.pad_token_id, [], [], [])
    windows.segments = [] if "token_type_ids" in found else None
    last = None  # the example of the latest window
    for i, (owner, pairs) in enumerate(
        zip(found["overflow_to_sample_mapping"], found["offset_mapping"], strict=True)
    ):
        example = examples[owner]
        if owner != last:
            # All windows of an example begin and end with the same tokens, but tokenizers 0.22
            # reports sequence ids of the first one only.
            last, parts = owner, found.sequence_ids(i)
            if 1 not in parts:
                windows.skipped.add(NO_TOKENS, example.place)
                continue
            before, after = parts.index(1), parts[::-1].index(1)
            windows.examples.append(example)
        window = torch.tensor(pairs, dtype=torch.int32)
        window[:before] = window[len(window) - after :] = 0
        windows.ids.append(found["input_ids"][i])
        windows.labels.append(_label(example.answers, window))
        windows.owners.append(len(windows.examples) - 1)
        windows.offsets.append(window)
        if windows.segments is not None:
            windows.segments.append(found["token_type_ids"][i])
    if not windows.ids:
        given = f"text of which nothing is left: {windows.skipped}"
        raise ArgumentError("data", given, "other text")
    return windows


def _label(answers: Sequence[tuple[str, int]], offsets: Tensor) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) if the window does not hold all of it."""
    if not answers:
        return 0, 0
    text, start = answers[0]
    end = start + len(text)
    firsts, lasts = offsets.unbind(1)
    tokens = ((lasts > start) & (firsts < end)).nonzero().flatten().tolist()
    whole = tokens and firsts[tokens[0]] <= start and lasts[tokens[-1]] >= end
    return (tokens[0], tokens[-1]) if whole else (0, 0)
