"""The answer is text: a causal language model, and the cross entropy of every next token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import cross_entropy, pad

from ...errors import ArgumentError
from ..batches import IGNORED, EncodedExamples, pad_rows
from ..chat import Row, encode_chats, prompt_ids
from ..data.examples import Example
from ..data.skipped import Skipped
from ..metrics import TEXT_METRIC_TITLES, Scores
from ..paired_metrics import TEXT_METRICS
from .base import Task


class EncodedText(EncodedExamples):
    """The labels are the tokens themselves, those of a prompt IGNORED."""

    def add(self, example: Example, ids: list[int], labels: list[int]) -> None:
        """Append a row."""
        self.examples.append(example)
        self.ids.append(ids)
        self.labels.append(labels)

    def targets(self, indices):
        return {"labels": pad_rows([self.labels[i] for i in indices], IGNORED)}

    def counted(self, indices):
        """The tokens that are learnt. The first one of a row is not: nothing stands before it."""
        return sum(self._counts[i] for i in indices)

    @cached_property
    def _counts(self) -> list[int]:
        return [sum(label != IGNORED for label in row[1:]) for row in self.labels]


@dataclass(frozen=True)
class TextTask(Task):
    """Language modelling: the texts themselves are learnt, after their prompts."""

    name = "text"
    auto_class = "AutoModelForCausalLM"
    accepted_model = "a model that transformers can load for text generation"
    peft_type = "CAUSAL_LM"
    outputs = None
    generates = True
    metric_titles = {
        "nll_per_token": "NLL a token", "perplexity": "perplexity", **TEXT_METRIC_TITLES,
    }  # fmt: skip
    headline = "loss a token"
    paired_metrics = TEXT_METRICS

    @classmethod
    def found_in(cls, examples, settings):
        return cls()  # any text can be learnt itself

    def check_config(self, config):
        """An encoder would learn to copy, because it sees the token that it has to predict."""
        kinds = config.architectures or []
        if kinds and not any(k.endswith(("CausalLM", "LMHeadModel")) for k in kinds):
            raise ValueError(f"{kinds[0]} is no language model; give a label column")

    def encode(self, examples, tokenizer, max_length):
        skipped = Skipped()
        if examples[0].conversation is None:  # then none of them is one
            rows = _plain_rows(examples, tokenizer)
        else:
            rows = encode_chats(examples, tokenizer, skipped)
        data = EncodedText([], [], tokenizer.pad_token_id, [], skipped=skipped)
        for example, ids, learnt in rows:
            ids, is_cut = ids[:max_length], len(ids) > max_length
            if not any(learnt[1 : len(ids)]):
                within = f" in its first {max_length} tokens" if is_cut else ""
                skipped.add(f"with nothing to learn{within}", example.place)
                continue
            data.add(example, ids, [t if n else IGNORED for t, n in zip(ids, learnt, strict=False)])
            data.cut += is_cut
        if not data.ids:
            accepted = "text of which something is left to learn, and room for it"
            raise ArgumentError("max_length", f"{max_length}; skipped: {skipped}", accepted)
        return data

    def loss(self, logits, labels, reduction="mean", label_smoothing=0.0):
        """``logits`` (rows, tokens, words), ``labels`` (rows, tokens) int64.

        The logits of a token are about the token after it.
        """
        labels = pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=IGNORED,
            label_smoothing=label_smoothing,
        )  # fmt: skip
        return loss.view_as(labels) if reduction == "none" else loss

    def prediction_rows(self, losses, logits, batch):
        """(negative log-likelihood, number of tokens) of each text."""
        counted = batch["labels"][:, 1:] != IGNORED
        return torch.stack([losses.sum(1), counted.sum(1)], dim=1)

    def score(self, rows, data) -> Scores:
        """The negative log-likelihood of a token, and the perplexity."""
        nll = (rows[:, 0].double().sum() / rows[:, 1].sum()).item()
        return {"nll_per_token": nll, "perplexity": math.exp(min(nll, 700))}, {}

    def answers(self, rows, data):
        """The negative log-likelihood and the number of tokens."""
        return [[round(nll, 5), tokens] for nll, tokens in rows.tolist()]

    def predictions(self, rows, data):
        table = [["text", "nll", "tokens"]]
        for example, row in zip(data.examples, rows.tolist(), strict=True):
            table.append([example.text, *row])
        return table


def prompt_tokens(tokenizer, examples: Sequence[Example]) -> list[list[int]]:
    """Token ids of the prompts of examples, after which their texts stand."""
    if examples[0].conversation is not None:
        return [prompt_ids(e.conversation, tokenizer) for e in examples]
    # A plain prompt stands on a line of its own. No special token stands first: versions of
    # transformers disagree about it.
    lines = [f"{e.prompt}\n" if e.prompt else "" for e in examples]
    return tokenizer(lines, add_special_tokens=False)["input_ids"]


def _plain_rows(examples: Sequence[Example], tokenizer) -> Iterator[Row]:
    """The rows of texts that stand by themselves, or after a prompt."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = prompt_tokens(tokenizer, examples)
    texts = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    for example, prompt, text in zip(examples, prompts, texts, strict=True):
        answer = text + end
        yield example, prompt + answer, [False] * len(prompt) + [True] * len(answer)
