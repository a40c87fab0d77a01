"""Selections on small models, and the training of a model that was swapped with one."""

import torch
from small_models import Block, Stack, loss_of

from deltadiff.diffora import Selection, find_candidates


def blocks(*names, dtype=torch.float32, hidden=None) -> Stack:
    """A stack of blocks; ``hidden`` gives the width of one more module of each block."""
    torch.manual_seed(0)
    hidden = hidden or [None] * len(names)
    made = [Block(n, hidden=h) for n, h in zip(names, hidden, strict=True)]
    return Stack(*made).to(dtype)


def select(model, *names) -> Selection:
    """The selection of the modules with these names."""
    return Selection(find_candidates(model), frozenset(names), 0.5)


def train(model, optimizer, steps=4) -> None:
    """Train a model that `small_models.build` made."""
    for t in range(steps):
        optimizer.zero_grad()
        loss_of(model, range(8 * t, 8 * t + 8)).backward()
        optimizer.step()
