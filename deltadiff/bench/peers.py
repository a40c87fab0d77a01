"""Peers of deltadiff: whether PEFT is installed, and W's update in plain PyTorch."""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # B and A of one weight


@functools.cache
def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def naive_update(
    weights: Sequence[Tensor], new: Sequence[Pair], old: Sequence[Pair], scale: float
) -> None:
    """W += scale (B'A' - BA) as it is written: two products and a temporary of the size of W."""
    for w, (b1, a1), (b0, a0) in zip(weights, new, old, strict=True):
        w += scale * (b1 @ a1 - b0 @ a0)


def addmm_update(
    weights: Sequence[Tensor], new: Sequence[Pair], old: Sequence[Pair], scale: float
) -> None:
    """The same with as little work as eager PyTorch can do it: one product of stacked factors."""
    for w, (b1, a1), (b0, a0) in zip(weights, new, old, strict=True):
        w.addmm_(torch.cat([b1, -b0], 1), torch.cat([a1, a0]), alpha=scale)
