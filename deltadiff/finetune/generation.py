"""Completions of held-out prompts, scored against all references that stand beside a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .data import Example, prompt_tokens
from .training import ModelRunner


@dataclass(frozen=True)
class Completion:
    """A prompt, what the model made of it, and what people did."""

    prompt: str
    text: str
    references: list[str]


def group_references(examples: Sequence[Example], most: int = -1) -> dict[str, list[str]]:
    """The texts of each prompt, prompts in the order of their first; ``most`` of them, -1: all."""
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example.text)
    names = list(groups)[: None if most < 0 else most]
    return {name: groups[name] for name in names}


@torch.no_grad()
def complete(
    forward: ModelRunner,
    tokenizer,
    examples: Sequence[Example],
    *,
    most: int,
    batch_size: int,
    num_beams: int,
    length_penalty: float,
    no_repeat_ngram_size: int,
    max_new_tokens: int,
) -> list[Completion]:
    """Beam search from the prompts of ``examples`` (one beam: greedy), ``most`` of them."""
    groups = group_references(examples, most)
    model, was_training = forward.model, forward.model.training
    model.eval()
    prompts = list(groups)
    ids = prompt_tokens(tokenizer, prompts)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [row or [start] for row in ids]  # no prompt: from the start of a text
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: dict[int, str] = {}
    options = {
        "num_beams": num_beams, "no_repeat_ngram_size": no_repeat_ngram_size, "do_sample": False,
        "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # What a model's own generation_config.json may ask for, and greedy search does not take.
        "temperature": None, "top_p": None, "top_k": None,
    }  # fmt: skip
    if num_beams > 1:
        options["length_penalty"] = length_penalty
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        width = max(len(ids[i]) for i in part)
        pads = [width - len(ids[i]) for i in part]
        rows = [[tokenizer.pad_token_id] * n + ids[i] for n, i in zip(pads, part, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in pads]
        rows, mask = (torch.tensor(t, device=forward.device) for t in (rows, mask))
        with forward.autocast():
            out = model.generate(input_ids=rows, attention_mask=mask, **options)
        decoded = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        texts |= dict(zip(part, map(str.strip, decoded), strict=True))
    model.train(was_training)
    return [Completion(p, texts[i], groups[p]) for i, p in enumerate(prompts)]
