"""The answer is text: a causal language model, and the cross entropy of every next token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy, pad

from ...errors import ArgumentError
from ..batches import IGNORED, EncodedExamples, pad_rows
from ..metrics import TEXT_METRIC_TITLES, Scores
from .base import Task


class EncodedText(EncodedExamples):
    """The labels are the tokens themselves, those of a prompt IGNORED."""

    def targets(self, indices):
        return {"labels": pad_rows([self.labels[i] for i in indices], IGNORED)}


@dataclass(frozen=True)
class TextTask(Task):
    """Language modelling: the texts themselves are learnt, after their prompts."""

    auto_class = "AutoModelForCausalLM"
    accepted_model = "a model that transformers can load for text generation"
    peft_type = "CAUSAL_LM"
    outputs = None
    generates = True
    metric_titles = {
        "nll_per_token": "NLL a token", "perplexity": "perplexity", **TEXT_METRIC_TITLES,
    }  # fmt: skip
    headline = "loss a token"

    @classmethod
    def found_in(cls, examples, settings):
        return cls()  # any text can be learnt itself

    def check_config(self, config):
        """An encoder would learn to copy, because it sees the token that it has to predict."""
        kinds = config.architectures or []
        if kinds and not any(k.endswith(("CausalLM", "LMHeadModel")) for k in kinds):
            raise ValueError(f"{kinds[0]} is no language model; give a label column")

    def encode(self, examples, tokenizer, max_length):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompts = prompt_tokens(tokenizer, [e.prompt for e in examples])
        texts = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
        ids, labels = [], []
        for prompt, text in zip(prompts, texts, strict=True):
            row = (prompt + text + end)[:max_length]
            ids.append(row)
            labels.append(([IGNORED] * len(prompt) + row[len(prompt) :])[:max_length])
        if all(label == IGNORED for row in labels for label in row[1:]):
            raise ArgumentError("max_length", max_length, "more tokens than the prompts have")
        return EncodedText(ids, labels, tokenizer.pad_token_id, examples)

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

    def predictions(self, rows, data):
        table = [["text", "nll", "tokens"]]
        for example, row in zip(data.examples, rows.tolist(), strict=True):
            table.append([example.text, *row])
        return table


def prompt_tokens(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts, each of which stands on a line of its own before its text."""
    # No special token stands first: versions of transformers disagree about it.
    lines = [f"{prompt}\n" if prompt else "" for prompt in prompts]
    return tokenizer(lines, add_special_tokens=False)["input_ids"]
