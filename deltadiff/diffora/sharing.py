"""`apply_`: stage 2 of DiffoRA, pairs for the selected modules and shared ones for the others.

Modules that were not selected are not frozen: those of one module type train one pair between them,
of its own rank (the paper's weight sharing). The pair is one `Parameter` for A and one for B that
several layers hold, so autograd sums their gradients, always in the same order.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import nn

from ..checks import dtype_name
from ..errors import ArgumentError, ArgumentTypeError, SwapError
from ..layers.linear import linear_shape
from ..layers.lora_linear import lora_layers
from ..layers.report import SwapReport, swap_report
from ..layers.swap import SELECTION, swap_, unswap_
from ..layers.targets import choose_modules
from .bilevel import Search
from .gates import Selection


def apply_(
    model: nn.Module,
    selection: Selection,
    *,
    r: int = 4,
    lora_alpha: float = 16,
    share_r: int = 2,
    share: bool = True,
    warm_start: Search | None = None,
    lora_dropout: float = 0.0,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Collection[str] = (),
    backend: str | None = None,
    seed: int | None = None,
) -> SwapReport:
    """Swap the modules of a selection, in place, for stage 2 (Algorithm 1, line 11).

    Train with `DeltaLoRA`: with ``update_ratio=0`` it is DiffoRA; above 0 the weights of the
    selected modules are updated too, and a shared pair still gets plain AdamW.

    Args:
        model: an eager model, the one that the selection was made for.
        selection: see `GateMatrix.discretise` and `random_selection`.
        r: rank of each selected module's own pair.
        share_r: rank of the pairs that the other modules of one type share across the layers of a
            stack. Where weights of one type differ in shape, dtype or device, each kind has a pair
            of its own, and the report says so.
        lora_alpha: own pairs are scaled by lora_alpha / r, shared ones by lora_alpha / share_r.
        share: False leaves the other modules frozen.
        warm_start: the search, closed: selected modules start with its pairs (their gates folded
            into B, so that they compute what they did) and ``modules_to_save`` with its values.
            None, the paper's way, starts afresh. Shared pairs always do.
        lora_dropout, adapter_dtype, modules_to_save, backend, seed: as for `swap_`.

    Returns:
        A report; prints as a table, which shows the layers that share.

    Raises:
        ArgumentTypeError, ArgumentError: a selection for another model, ranks that do not fit, a
            search of another rank; nothing was changed.
        SwapError: a model that is swapped already, as by a search that was not closed.
    """
    if not isinstance(selection, Selection):
        raise ArgumentTypeError("selection", type(selection).__name__, "a Selection")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    if lora_layers(model):
        raise SwapError("model", "a model that is swapped already", "an eager model, or `close()`")
    if not selection.selected:
        raise ArgumentError("selection", "no selected module", "at least one")
    modules = _find(model, selection, modules_to_save)
    groups, notes = _groups(selection, modules) if share else ({}, [])
    _check_rank("share_r", share_r, [(n, modules[n]) for names in groups.values() for n in names])
    _check_rank("r", r, [(name, modules[name]) for name in sorted(selection.selected)])
    if warm_start is not None:
        _check_search(warm_start, selection, r)

    options = {
        "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "adapter_dtype": adapter_dtype,
        "modules_to_save": modules_to_save, "backend": backend,
    }  # fmt: skip
    own, shared = selection.selected, {n for names in groups.values() for n in names}
    swap_(model, r=r, target_modules=lambda name, _: name in own, seed=seed, **options)
    if shared:
        other_seed = None if seed is None else seed + 2**32  # not the numbers of the own pairs
        try:
            swap_(
                model, r=share_r, target_modules=lambda name, _: name in shared,
                seed=other_seed, **options,
            )  # fmt: skip
        except ArgumentError:
            unswap_(model)
            raise
    for group, names in groups.items():
        share_pair(group, [model.get_submodule(name) for name in names])
    if warm_start is not None:
        _start_warm(model, selection, warm_start)
    if not share and selection.others:
        notes = [f"{len(selection.others)} modules were not selected and are frozen"]
    model.__dict__[SELECTION] = selection
    return replace(swap_report(model), notes=tuple(notes))


def selection_of(model: nn.Module) -> Selection | None:
    """The selection (with its gates) that a model was swapped with, also one loaded from a file."""
    return model.__dict__.get(SELECTION)


def share_pair(group: str, layers: list) -> None:
    """Let all layers of a group hold the pair of the first."""
    for layer in layers:
        layer.lora_A, layer.lora_B = layers[0].lora_A, layers[0].lora_B
        layer.share_group = group


# ---------------------------------------------------------------------- who shares


def _groups(selection: Selection, modules: dict) -> tuple[dict[str, list[str]], list[str]]:
    """Name of each group -> its modules, and what was split and why."""
    candidates, kinds = selection.candidates, {}
    stacks = {layer.rpartition(".")[0] for layer in candidates.layers}
    for name in selection.others:
        i, j = candidates.places[name]
        stack, w = candidates.layers[i].rpartition(".")[0], modules[name].weight
        group = candidates.types[j] if len(stacks) == 1 else f"{stack}.*.{candidates.types[j]}"
        shape = " x ".join(map(str, linear_shape(modules[name])))
        kind = shape, dtype_name(w.dtype), str(w.device)
        kinds.setdefault(group, {}).setdefault(kind, []).append(name)
    groups, notes = {}, []
    for group, parts in kinds.items():
        if len(parts) == 1:
            groups[group] = next(iter(parts.values()))
            continue
        columns = [k for k in range(3) if len({kind[k] for kind in parts}) > 1]
        parts = {", ".join(kind[k] for k in columns): names for kind, names in parts.items()}
        groups |= {f"{group} ({part})": names for part, names in parts.items()}
        notes.append(f"{group}: {len(parts)} shared pairs, for weights of {'; '.join(parts)}")
    return groups, notes


# ---------------------------------------------------------------------- checks


def _find(model: nn.Module, selection: Selection, modules_to_save) -> dict[str, nn.Module]:
    modules = choose_modules(model, lambda *_: True, modules_to_save)
    for name in selection.candidates.places:
        if name not in modules:
            accepted = "a selection that was made for this model"
            raise ArgumentError("selection", f"{name}, which is no linear layer here", accepted)
    return modules


def _check_rank(argument: str, rank: object, modules: list[tuple[str, nn.Module]]) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise ArgumentTypeError(argument, repr(rank), "an int of at least 1")
    for name, module in modules:
        n, k = linear_shape(module)
        if not 1 <= rank <= min(n, k):
            accepted = f"1 to {min(n, k)}, the smaller side of {name} {n} x {k}"
            raise ArgumentError(argument, rank, accepted)


def _check_search(search: Search, selection: Selection, r: int) -> None:
    if not isinstance(search, Search):
        raise ArgumentTypeError("warm_start", type(search).__name__, "a Search or None")
    for name in sorted(selection.selected):
        layer = search.layers.get(name)
        if layer is None:
            raise ArgumentError("warm_start", f"a search without {name}", "one over this selection")
        if layer.r != r:
            raise ArgumentError("r", r, f"{layer.r}, the rank of the search, for a warm start")


@torch.no_grad()
def _start_warm(model: nn.Module, selection: Selection, search: Search) -> None:
    gates = search.gates()
    for name in selection.selected:
        layer, before = model.get_submodule(name), search.layers[name]
        i, j = search.candidates.places[name]
        layer.lora_A.copy_(before.lora_A)
        layer.lora_B.copy_(before.lora_B * (gates.values[i][j] * before.scaling / layer.scaling))
    for name, p in model.named_parameters():
        if name in search.heads and p.requires_grad:
            p.copy_(search.heads[name])
