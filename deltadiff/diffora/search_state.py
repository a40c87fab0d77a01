"""States of searches: whether a search can take one, and whether several processes have the same.

A state may come from a file of any content, so `check_state` looks at all of it.
"""

import hashlib
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..optim.saved_state import PREFIX
from .candidates import Candidates

_OF_ADAM = ("step", "exp_avg", "exp_avg_sq")
_OF_GROUP = ("lr", "betas", "eps", "weight_decay", "params", "fused")


def check_state(state: Any, own: dict) -> None:
    """Check a state of `Search.state_dict`.

    Args:
        state: to be loaded.
        own: the state of the search that is to load it.

    Raises:
        ArgumentError: ``state`` is no such state, or one over other candidates or of other shapes.
            The message names the first difference.
    """
    _check("state", state, isinstance(state, dict) and own.keys() <= state.keys(), "a whole state")
    assert isinstance(state, dict)
    _check_candidates(state["candidates"], own["candidates"])
    trained, place, losses = (state[name] for name in ("trained", "place", "losses"))
    _check("trained", trained, isinstance(trained, dict), "tensors by name")
    for name in [*own["trained"], *trained]:
        _check_tensor(name, trained.get(name), own["trained"].get(name))
    _check_tensor("logits", state["logits"], own["logits"])
    pair = isinstance(place, (tuple, list)) and len(place) == 2
    fits = pair and all(type(n) is int and 0 <= n < 2**31 for n in place)
    _check("place", place, fits, "the numbers of a round and of a step")
    pair = isinstance(losses, (tuple, list)) and len(losses) == 2
    fits = pair and all(isinstance(part, list) for part in losses)
    fits = fits and all(isinstance(loss, float) for part in losses for loss in part)
    _check("losses", losses, fits, "those of the gates and of the pairs")
    for name in ("optimizer", "gate_optimizer"):
        _check_groups(name, state[name], own[name])
    _check_adam(state["gate_optimizer"], own["logits"])


def fingerprint(state: Any) -> str:
    """The SHA-256 of all numbers, texts and tensors in nested dicts, lists and tuples."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            part = value.detach().cpu().contiguous()
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            digest.update(f"{type(value).__name__} {len(value)} ".encode())
            for entry in value.items() if isinstance(value, dict) else value:
                add(entry)
        else:
            digest.update(f"{value!r} ".encode())

    add(state)
    return digest.hexdigest()


def _check(name: str, given: object, holds: object, accepted: str) -> None:
    if not holds:
        raise ArgumentError(name, f"{given!r:.60}", accepted)


def _check_candidates(there: Any, here: dict) -> None:
    lists: dict[str, Any] = there if isinstance(there, dict) else {}
    layers, modules = lists.get("layers", ()), lists.get("modules", ())
    fits = isinstance(layers, (list, tuple)) and isinstance(modules, (list, tuple))
    _check("candidates", there, fits and len(layers) == len(modules), "layers and modules")
    rows = [row for row in modules if isinstance(row, (list, tuple))]
    names = [*layers, *(name for row in rows for name in row)]
    fits = len(rows) == len(modules) and all(isinstance(name, str) for name in names)
    _check("candidates", there, fits, "names of layers and modules")
    pairs = (layers, rows), (here["layers"], here["modules"])
    saved, own = (Candidates(tuple(a), tuple(map(tuple, b))).places for a, b in pairs)
    for theirs, ours in zip_longest(saved, own):
        if theirs != ours:
            accepted = f"{ours}, as in this model" if ours else "no more candidates"
            raise ArgumentError("candidates", theirs or "none", accepted)


def _check_tensor(name: str, there: Any, here: Tensor | None) -> None:
    given, accepted = (
        f"shape {tuple(t.shape)}{'' if t.is_floating_point() else f' of {t.dtype}'}"
        if isinstance(t, Tensor)
        else "nothing"
        for t in (there, here)
    )
    if given != accepted:
        raise ArgumentError(name, given, f"{accepted}, as in this search")


def _check_groups(name: str, state: Any, own: dict) -> None:
    """Check the hyperparameters of an optimizer, which other versions of torch may not all have."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    fits = isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
    _check(name, state, fits, "the state of an optimizer with one group")
    assert isinstance(groups, list)
    for key, here in own["param_groups"][0].items():
        if key.startswith(PREFIX):
            continue  # of the run, which the optimizer checks itself
        there = groups[0].get(key, None if key in _OF_GROUP else here)
        _check(f"{key} of {name}", there, _is_like(there, here), f"such as {here!r}")


def _check_adam(state: dict, logits: Tensor) -> None:
    """Adam's own `load_state_dict` takes whatever it is given, and fails in its next step."""
    accepted, values = "that of Adam for the logits alone", state.get("state")
    _check("gate_optimizer", values, isinstance(values, dict) and values.keys() <= {0}, accepted)
    assert isinstance(values, dict)
    for moments in values.values():
        fits = isinstance(moments, dict) and moments.keys() == set(_OF_ADAM)
        _check("gate_optimizer", moments, fits, accepted)
        for name, here in zip(_OF_ADAM, (logits.sum(), logits, logits), strict=True):
            _check_tensor(f"{name} of gate_optimizer", moments[name], here)


def _is_like(there: Any, here: Any, most: float = 1e30) -> bool:
    """Whether a value can stand in the place of another one in a group of parameters."""
    if isinstance(here, (list, tuple)):
        fits = isinstance(there, (list, tuple)) and len(there) == len(here)
        # The only numbers in a list are the betas.
        return fits and all(_is_like(t, h, 1.0) for t, h in zip(there, here, strict=True))
    if type(here) is float:
        return type(there) in (int, float) and 0 <= there < most
    return type(there) is type(here) and there == here
