"""Completions of held-out prompts, beside all references that belong to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_csv
from .data.examples import Example
from .runner import ModelRunner
from .tasks.text import prompt_tokens

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class Completion:
    """A prompt, what the model made of it, and the texts that people wrote (the references)."""

    prompt: str
    text: str
    references: list[str]


def group_references(examples: Sequence[Example], most: int = -1) -> dict[str, list[str]]:
    """The texts of each prompt, of the first ``most`` prompts; -1 means all."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example.text)
    names = list(groups)[: None if most < 0 else most]
    return {name: groups[name] for name in names}


@torch.no_grad()
def complete(
    runner: ModelRunner, tokenizer, examples: Sequence[Example], settings: "Settings"
) -> list[Completion]:
    """Complete the first ``settings.generate`` prompts by beam search, greedy for one beam."""
    groups = group_references(examples, settings.generate)
    model, was_training = runner.model, runner.model.training
    model.eval()
    prompts = list(groups)
    ids = prompt_tokens(tokenizer, prompts)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [row or [start] for row in ids]  # without a prompt, a text begins with the start token
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: dict[int, str] = {}
    options = {
        "num_beams": settings.num_beams, "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "do_sample": False, "max_new_tokens": settings.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
        # A model's own generation_config.json may set these, which greedy search does not take.
        "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    if settings.num_beams > 1:
        options["length_penalty"] = settings.length_penalty
    for at in range(0, len(order), settings.measured_at_once):
        part = order[at : at + settings.measured_at_once]
        width = max(len(ids[i]) for i in part)
        pads = [width - len(ids[i]) for i in part]
        rows = [[tokenizer.pad_token_id] * n + ids[i] for n, i in zip(pads, part, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in pads]
        rows, mask = (torch.tensor(t, device=runner.device) for t in (rows, mask))
        with runner.autocast():
            out = model.generate(input_ids=rows, attention_mask=mask, **options)
        decoded = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        texts |= dict(zip(part, map(str.strip, decoded), strict=True))
    model.train(was_training)
    return [Completion(p, texts[i], groups[p]) for i, p in enumerate(prompts)]


def write_completions(path: Path, completions: Sequence[Completion]) -> None:
    """Write a line for each prompt: what the model wrote, and the references."""
    lines = [[c.prompt, c.text, "\n".join(c.references)] for c in completions]
    write_csv(path, [["prompt", "completion", "references"], *lines])
