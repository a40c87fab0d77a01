"""Completions of held-out prompts, beside all references that belong to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import write_csv
from .chat import encode_chats, turn_ends
from .data.examples import Example
from .data.skipped import Skipped
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


def group_by_prompt(examples: Sequence[Example], most: int = -1) -> list[list[Example]]:
    """The examples of each prompt, of the first ``most`` prompts; -1 means all."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    return list(groups.values())[: None if most < 0 else most]


def end_tokens(model, tokenizer, example: Example) -> list[int]:
    """The tokens after which a completion ends.

    A chat template may end a turn with another token than the tokenizer ends a text with.
    """
    known = getattr(model, "generation_config", None)
    known = getattr(known, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    if example.conversation is not None:
        for row in encode_chats([example], tokenizer, Skipped()):
            found |= turn_ends(row, tokenizer)
    return sorted(found)


@torch.no_grad()
def complete(
    runner: ModelRunner, tokenizer, examples: Sequence[Example], settings: "Settings"
) -> list[Completion]:
    """Complete the first ``settings.generate`` prompts by beam search, greedy for one beam."""
    groups = group_by_prompt(examples, settings.generate)
    model, was_training = runner.model, runner.model.training
    model.eval()
    firsts = [group[0] for group in groups]
    ids = prompt_tokens(tokenizer, firsts)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [row or [start] for row in ids]  # without a prompt, a text begins with the start token
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: dict[int, str] = {}
    ends = end_tokens(model, tokenizer, firsts[0])
    options = {
        "num_beams": settings.num_beams, "no_repeat_ngram_size": settings.no_repeat_ngram_size,
        "do_sample": False, "max_new_tokens": settings.max_new_tokens,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends or None,
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
    return [
        Completion(group[0].prompt, texts[i], [e.text for e in group])
        for i, group in enumerate(groups)
    ]


def write_completions(path: Path, completions: Sequence[Completion]) -> None:
    """Write a line for each prompt: what the model wrote, and the references."""
    lines = [[c.prompt, c.text, "\n".join(c.references)] for c in completions]
    write_csv(path, [["prompt", "completion", "references"], *lines])
