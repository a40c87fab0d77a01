"""`SavedState`: a state dict of an optimizer, checked before anything is changed.

Its form is that of `torch.optim.Optimizer.state_dict`. What an optimizer keeps beside torch's
entries lies in two places, so that whatever knows that form (accelerate, torch.distributed's
checkpoints) can carry it:

    state[i]           what belongs to one parameter, as tensors, see below
    param_groups[i]    what belongs to the run, the same in each group: "deltadiff.format",
                       "deltadiff.method", "deltadiff.iteration" (the steps that were not skipped),
                       and what a method adds

Of Delta-LoRA a parameter has, beside its moments:

    anchor, last               of each factor, see `PendingDelta`
    remainder                  of a 16-bit W that is updated in place, see `saved_weight`; this
                               and what follows is in the entry of lora_B
    weight                     W, where it is updated in place; a reference, not a copy
    update, past_A, past_B     see `layers.saved_update`; missing before the first step

States without a format are older: there a run was an entry of "state", under the name of its
method. They are read, as are states of `torch.optim.AdamW`.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError
from ..layers.lora_layers import LoraLayer
from ..layers.saved_update import SavedUpdate, read_update
from ..ranks import copy_values, is_sharded, why_no_shard

FORMAT = 3  # 1: the run lay in "state"; 2: a remainder was int16, now it is its bytes
PREFIX = "deltadiff."  # of what belongs to the run
OLDER_RUNS = ("delta_lora", "adalora", "dylora")


@dataclass
class SavedState:
    """The parts of a state dict.

    Attributes:
        groups: the values of each param group, without "params" and without those of the run.
        entries: what "state" holds of each parameter of the optimizer that loads it.
        run: what belongs to the run, by names without prefix; no format for an older state.
        older: the run in an older state, by the name of its method.
        ids: the parameters by their number in the state.
        layers: the layers whose update the state holds, by name.
        weights: W of these by lora_B, where it is updated in place.
        updates: the rest of it, by lora_B; none from before the first step.
    """

    groups: list[dict[str, Any]]
    entries: dict[Tensor, dict[str, Any]]
    run: dict[str, Any]
    older: dict[str, Any]
    ids: dict[object, Tensor]
    layers: dict[str, LoraLayer] = field(default_factory=dict)
    weights: dict[Tensor, Tensor] = field(default_factory=dict)
    updates: dict[Tensor, SavedUpdate] = field(default_factory=dict)

    def merged_groups(
        self, own_groups: list[dict[str, Any]], defaults: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The own param groups as they will be; raises where the state lacks a value."""
        merged = []
        for own, group in zip(own_groups, self.groups, strict=True):
            missing = sorted((defaults.keys() & own.keys()) - group.keys())
            _need(not missing, f"a param group without {', '.join(missing)}", "all of its values")
            lr = group["lr"]
            if isinstance(lr, Tensor):  # the optimizer keeps its own tensor, or number
                fine = lr.numel() == 1 and lr.is_floating_point() and not lr.is_meta
                _need(fine, f"lr: a tensor of {tuple(lr.shape)}", "one number")
                group["lr"] = lr.item()
            merged.append({**own, **group})
        return merged

    def number(self, name: str, least: int = 0) -> int:
        """An int of the run; raises where it is missing, another type or too small."""
        return saved_int(name, self.run.get(name), least)


def saved_int(name: str, value: object, least: int) -> int:
    """``value``, an int or a tensor of one, as an int; raises where it is none or too small."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
        raise ArgumentError(f"{name} in state_dict", repr(value)[:60], f"an int >= {least}")
    return value


def saved_steps(value: object) -> int:
    """The steps that a parameter has done; raises where they are no count."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    fine = isinstance(number, (int, float)) and not isinstance(number, bool)
    _need(
        fine and math.isfinite(number) and 0 <= number == int(number) < 2**53,  # type: ignore
        f"step {number!r:.60}",
        "a count of steps",
    )
    return int(number)  # type: ignore[call-overload]


def _need(condition: bool, given: str, accepted: str) -> None:
    if not condition:
        raise ArgumentError("state_dict", given, accepted)


def read_state(
    state_dict: object, own_groups: list[dict[str, Any]], methods: tuple[str, ...]
) -> SavedState:
    """The parts of ``state_dict``, for an optimizer of ``own_groups``.

    Args:
        methods: those whose states it reads; the first is its own.

    Raises:
        ArgumentError: it is no state dict, of another method, of other groups or of a newer format.
    """
    accepted = "what `state_dict()` of an optimizer gives"
    _need(isinstance(state_dict, dict), type(state_dict).__name__, accepted)
    assert isinstance(state_dict, dict)
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    _need(isinstance(state, dict), f"state: {type(state).__name__}", accepted)
    _need(isinstance(groups, list), f"param_groups: {type(groups).__name__}", accepted)
    assert isinstance(state, dict) and isinstance(groups, list)
    for group in groups:
        fine = isinstance(group, dict) and isinstance(group.get("params"), list)
        _need(fine, "a param group without a list of params", accepted)
    sizes, own_sizes = ([len(g["params"]) for g in gs] for gs in (groups, own_groups))
    given = f"groups of {sizes} parameters"
    _need(sizes == own_sizes, given, f"groups of {own_sizes}")
    ids = [i for g in groups for i in g["params"]]
    _need(all(isinstance(i, (int, str)) for i in ids), f"params {ids[:8]}", "numbers or names")
    _need(len(set(ids)) == len(ids), f"params {ids[:8]}", "each of them once")
    older = {name: state[name] for name in OLDER_RUNS if name in state and name not in ids}
    foreign = [repr(i)[:40] for i in state if i not in ids and i not in older]
    _need(not foreign, f"entries of {', '.join(foreign[:4])}", "those of its groups")
    params = [p for g in own_groups for p in g["params"]]
    entries = {}
    for i, p in zip(ids, params, strict=True):
        entry = state.get(i, {})
        _need(isinstance(entry, dict), f"parameter {i}: {type(entry).__name__}", "a dict")
        entries[p] = dict(entry)
    runs: list[dict[str, Any]] = [{} for _ in groups]
    plain: list[dict[str, Any]] = [{} for _ in groups]
    for group, run, values in zip(groups, runs, plain, strict=True):
        _need(all(isinstance(k, str) for k in group), "a param group with odd keys", accepted)
        for name, value in group.items():
            target = run if name.startswith(PREFIX) else values
            target[name.removeprefix(PREFIX)] = value
        del values["params"]
    one = all(map(same_values, runs, runs[:1] * len(runs)))
    _need(one, "param groups of several runs", "groups of one run")
    numbers = dict(zip(ids, params, strict=True))
    saved = SavedState(plain, entries, dict(runs[0]) if runs else {}, older, numbers)
    _check_origin(saved, methods)
    return saved


def run_entries(run: dict[str, Any]) -> dict[str, Any]:
    """What a param group of a state gets of a run of this version."""
    return {f"{PREFIX}{name}": value for name, value in {"format": FORMAT, **run}.items()}


def same_values(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold the same keys and values, tensors among them."""

    def equal(a: object, b: object) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            plain = all(t.layout == torch.strided and not t.is_meta for t in (a, b))
            return a is b or (plain and a.shape == b.shape and torch.equal(a.cpu(), b.cpu()))
        return type(a) is type(b) and a == b

    return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)


def _check_origin(saved: SavedState, methods: tuple[str, ...]) -> None:
    """Raise where a newer version or another method saved the state."""
    if "format" not in saved.run:
        return
    number = saved_int("deltadiff.format", saved.run["format"], 1)
    _need(number <= FORMAT, f"format {number}, of a newer deltadiff", f"format {FORMAT} or older")
    theirs = saved.run.get("method")
    _need(theirs in methods, f"a state of {theirs!r:.60}", f"one of {methods[0]}")


def check_entry(i: object, found: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Raise unless the entry of a parameter has the tensors ``own``, of their shapes and kinds."""

    def described(tensors: dict[str, Any]) -> str:
        kinds = {
            k: tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            for k, t in tensors.items()
        }
        return f"parameter {i} with {kinds}"

    fits = found.keys() == own.keys()
    for name, expected in own.items() if fits else ():
        t = found[name]
        if name == "step" and isinstance(t, (int, float)) and not isinstance(t, bool):
            found[name] = t = torch.tensor(float(t))
        fits &= isinstance(t, Tensor) and t.layout == torch.strided and not t.is_meta
        # That of a Conv1D is split by its columns, as W is.
        by_columns = name == "remainder" and is_sharded(t) and why_no_shard(t.T) is None
        fits = fits and (by_columns or why_no_shard(t) is None)
        fits = fits and (t.shape == expected.shape or (name == "step" and t.numel() == 1))
        fits = fits and t.is_floating_point() == expected.is_floating_point()
        fits = fits and not t.is_complex() and t.dtype != torch.bool
    if not fits:
        raise ArgumentError("state_dict", described(found), described(own))
    saved_steps(found["step"])
    if "remainder" in own and found["remainder"].dtype != own["remainder"].dtype:
        given, accepted = (str(t["remainder"].dtype) for t in (found, own))
        raise ArgumentTypeError(f"remainder of parameter {i} in state_dict", given, accepted)


def take_entry(found: dict[str, Any], own: dict[str, Tensor]) -> None:
    """Copy the tensors of a checked entry into the optimizer's own."""
    for name, t in found.items():
        copy_values(own[name], t if is_sharded(t) else t.reshape(own[name].shape))


def take_update(
    name: str, entry: dict[str, Any], layer: LoraLayer, inplace: bool
) -> SavedUpdate | None:
    """What `read_update` finds in the entry of a layer's lora_B, on its device.

    Raises:
        ArgumentError: as there; it is of another ``w_update``.
    """
    where = f"update of {name} in state_dict"
    saved = read_update(where, entry, (layer.out_features, layer.in_features))
    if saved is not None and saved.in_weight != inplace:
        given = f"one that W {'holds' if saved.in_weight else 'does not hold'}"
        raise ArgumentError(where, given, "that of such an optimizer")
    return None if saved is None else saved.to(layer.lora_A.device)
