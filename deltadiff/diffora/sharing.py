"""`apply_`: stage 2 of DiffoRA, pairs for the selected modules and shared ones for the others.

Modules that were not selected are not frozen: those of one module type train one common pair, whose
rank may differ from that of the other pairs (the paper's weight sharing). Several layers hold the
same `Parameter` for A and for B, so autograd sums their gradients, always in the same order. States
and files hold a shared pair once, under the first layer of its group.
"""

import functools
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checks import check_int, dtype_name
from ..errors import ArgumentError, ArgumentTypeError, SwapError
from ..layers.fsdp_places import check_before_sharding
from ..layers.linear import check_rank, linear_shape, refuse_peft
from ..layers.lora_layers import lora_layers
from ..layers.model_notes import note_selection, noted_selection
from ..layers.report import SwapReport, swap_report
from ..layers.swap import swap_, unswap_
from ..layers.targets.choose import choose_modules
from ..ranks import whole
from .bilevel import Search
from .candidates import swapped_candidate
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

    To shard the model by FSDP2, call `apply_`, then `fully_shard`, then make the optimizer; layers
    that share a pair belong to one unit.

    Train the model with `DeltaLoRA`: with ``update_ratio=0`` the method is DiffoRA; above 0 the
    weights of the selected modules are updated too, while the shared pairs still get plain AdamW.

    Args:
        model: the eager model that the selection was made for.
        selection: made by `GateMatrix.discretise` or `random_selection`.
        r: rank of each selected module's own pair.
        share_r: rank of the pairs that the other modules of one type share across the layers of a
            stack. Where weights of one type differ in shape, dtype or device, each kind has a pair
            of its own, and the report says so.
        lora_alpha: own pairs are scaled by lora_alpha / r, shared ones by lora_alpha / share_r.
        share: False leaves the modules that were not selected frozen.
        warm_start: a closed search. Selected modules start with its pairs (each gate multiplied
            into B, so that the branch computes the same as before) and ``modules_to_save`` with
            its values. None starts afresh, as the paper does; shared pairs always start afresh. If
            its model was sharded, all processes call this.
        lora_dropout, adapter_dtype, modules_to_save, backend, seed: as for `swap_`.

    Returns:
        A report; it prints as a table, which shows the layers that share a pair.

    Raises:
        ArgumentTypeError, ArgumentError: the selection is for another model, a rank does not fit,
            the search has another rank, or the model is PEFT's; nothing was changed.
        SwapError: the model is swapped already, for instance by a search that was not closed, or
            was sharded before.
    """
    if not isinstance(selection, Selection):
        raise ArgumentTypeError("selection", type(selection).__name__, "a Selection")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    refuse_peft("DiffoRA", model)
    if lora_layers(model):
        raise SwapError("model", "a model that is swapped already", "an eager model, or `close()`")
    if not selection.selected:
        raise ArgumentError("selection", "no selected module", "at least one")
    order = "`apply_`, then `fully_shard`, then the optimizer"
    check_before_sharding("apply_", model, order)
    modules = _find(model, selection, modules_to_save)
    groups, notes = _groups(selection, modules) if share else ({}, [])
    own, shared = selection.selected, {n for names in groups.values() for n in names}
    for argument, rank, names in (("share_r", share_r, shared), ("r", r, own)):
        check_int(argument, rank, 1 if names else 0)  # a rank that no module gets may be 0
        for name in sorted(names):
            check_rank(argument, rank, name, modules[name])
    if warm_start is not None:
        _check_search(warm_start, selection, r)

    swap = functools.partial(
        swap_, model, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
        adapter_dtype=adapter_dtype, modules_to_save=modules_to_save, backend=backend,
    )  # fmt: skip
    swap(r=r, target_modules=lambda name, _: name in own, seed=seed)
    if shared:
        # Another seed, so that shared pairs do not start with the numbers of the own ones.
        other_seed = None if seed is None else seed + 2**32
        try:
            swap(r=share_r, target_modules=lambda name, _: name in shared, seed=other_seed)
        except ArgumentError:
            unswap_(model)
            raise
    place = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    for group, members in groups.items():
        layers = [swapped_candidate(model, name) for name in sorted(members, key=place.__getitem__)]
        for layer in layers:
            layer.share_pair(layers[0], group)
    if warm_start is not None:
        _start_warm(model, selection, warm_start)
    if not share and selection.others:
        notes = [f"{len(selection.others)} modules were not selected and are frozen"]
    note_selection(model, selection.to_json())
    return replace(swap_report(model), notes=tuple(notes))


def selection_of(model: nn.Module) -> Selection | None:
    """The selection, with its gates, that `apply_` swapped a model with, or a loaded adapter's.

    Returns:
        None where the model was swapped otherwise, or is not swapped.

    Raises:
        ArgumentError: the adapter that was loaded holds a garbled selection.
    """
    data = noted_selection(model)
    return None if data is None else Selection.from_json(data)


# ---------------------------------------------------------------------- who shares


def _groups(
    selection: Selection, modules: dict[str, nn.Module]
) -> tuple[dict[str, list[str]], list[str]]:
    """The modules of each group by its name, and notes on the types that had to be split."""
    candidates = selection.candidates
    kinds: dict[str, dict[tuple[str, ...], list[str]]] = {}  # by group, then by kind
    stacks = {layer.rpartition(".")[0] for layer in candidates.layers}
    for name in selection.others:
        i, j = candidates.places[name]
        stack, w = candidates.layers[i].rpartition(".")[0], modules[name].weight
        assert isinstance(w, Tensor)  # The module is a linear layer.
        group = candidates.types[j] if len(stacks) == 1 else f"{stack}.*.{candidates.types[j]}"
        shape = " x ".join(map(str, linear_shape(modules[name])))
        kind = shape, dtype_name(w.dtype), str(w.device)
        kinds.setdefault(group, {}).setdefault(kind, []).append(name)
    groups: dict[str, list[str]] = {}
    notes: list[str] = []
    for group, parts in kinds.items():
        if len(parts) == 1:
            groups[group] = next(iter(parts.values()))
            continue
        columns = [k for k in range(3) if len({kind[k] for kind in parts}) > 1]
        named = {", ".join(kind[k] for k in columns): names for kind, names in parts.items()}
        groups |= {f"{group} ({part})": names for part, names in named.items()}
        notes.append(f"{group}: {len(named)} shared pairs, for weights of {'; '.join(named)}")
    return groups, notes


# ---------------------------------------------------------------------- checks


def _find(
    model: nn.Module, selection: Selection, modules_to_save: Collection[str]
) -> dict[str, nn.Module]:
    """The linear layers of the model by name, among them all candidates of the selection."""
    modules = choose_modules(model, lambda *_: True, modules_to_save)
    for name in selection.candidates.places:
        if name not in modules:
            accepted = "a selection that was made for this model"
            raise ArgumentError("selection", f"{name}, which is no linear layer here", accepted)
    return modules


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
    """Copy the pairs of the selected modules and the heads from a search."""
    gates = search.gates()
    for name in selection.selected:
        layer, before = swapped_candidate(model, name), search.layers[name]
        i, j = search.candidates.places[name]
        gate = gates.values[i][j]
        assert gate is not None  # Every candidate has a gate.
        layer.lora_A.copy_(whole(before.lora_A))
        layer.lora_B.copy_(whole(before.lora_B) * (gate * before.scaling / layer.scaling))
    for name, p in model.named_parameters():
        if name in search.heads and p.requires_grad:
            p.copy_(search.heads[name])
