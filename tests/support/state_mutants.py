"""States of optimizers with one thing wrong in them."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# What a value may be replaced by.
WRONG = [
    None, True, -1, 0, 2**70, -0.5, 0.5, float("nan"), float("inf"), "x", b"", [], {}, [1], (0.9,),
    torch.zeros(()), torch.ones(1, 1, 3), torch.tensor(float("nan")), torch.tensor(-1.0),
    torch.tensor(0.5), torch.zeros(4, dtype=torch.int64), torch.ones(2, 2, device="meta"),
    torch.ones(2, 2).to_sparse(), torch.tensor([1 + 1j]), torch.zeros(0), object,
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside of ``value`` with each of its keys."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def mutate(state: dict[str, Any], draw: random.Random) -> tuple[Any, str]:
    """A changed copy of ``state``, and the change in words."""
    state = copy.deepcopy(state)
    holder, key = draw.choice(list(places(state)))
    how = draw.choice(["remove", "replace", "replace", "replace", "reshape", "cast", "add", "all"])
    value = holder[key]
    if how == "remove":
        del holder[key]
    elif how == "add":
        wrong = draw.choice(WRONG)
        if isinstance(holder, dict):
            holder[draw.choice(["more", 99, None, "deltadiff.more", "past_A.7"])] = wrong
        else:
            holder.append(wrong)
    elif how == "all":
        return draw.choice(WRONG), "everything"
    elif isinstance(value, Tensor) and how == "reshape" and value.dim():
        holder[key] = value[..., :-1].clone()
    elif isinstance(value, Tensor) and how == "cast":
        holder[key] = value.to(draw.choice([torch.int8, torch.float16, torch.complex64]))
    else:
        holder[key] = draw.choice(WRONG)
    return state, f"{how} {key!r}"
