"""`DeltaLoRAState`: how the state of `DeltaLoRA` is saved and loaded; see `saved_state`."""

from typing import Any

import torch
from torch import Tensor

from ..checks import REMAINDER_DTYPES
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..layers.saturation import warn_saturated
from ..layers.saved_update import SavedUpdate
from ..ranks import copy_values, gathered, local
from .older_updates import add_older_updates
from .param_groups import find_pairs, layer_names
from .saved_state import SavedState, take_entry, take_update
from .saved_weight import read_remainder, take_weight
from .updated_pairs import UpdatedPairs
from .weight_update import WeightUpdate
from .zero_vectors import UPDATES, check_complete, pack, unpack


class DeltaLoRAState(UpdatedPairs):
    """The part of `DeltaLoRA` that outlives it."""

    weight_updates: list[WeightUpdate]
    _unseen: dict[Tensor, Tensor]  # see `PendingDelta`

    def _bound_iteration(self, t: Tensor | int) -> None:
        raise NotImplementedError

    def _bind(self, restored: dict[Tensor, SavedUpdate] | None = None) -> None:
        """As there; ``restored``: what a state says of past updates, see `WeightUpdate.bind`."""
        super()._bind()

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; with the values of A and B it resumes bit by bit.

        In place, it refers to W and holds its remainder: on disk it has the size of these weights,
        which A and B could give back only rounded otherwise. Where a float16 W has reached the end
        of its range, a warning says so once.

        Raises:
            SwapError: the forward pass adds an update that is not known any more, because A or B
                were written where no step could follow.
        """
        saved = super().state_dict()
        params = [p for group in self.param_groups for p in group["params"]]
        entries = {p: dict(saved["state"][i]) for i, p in enumerate(params)}
        saved["state"] = {i: entries[p] for i, p in enumerate(params)}
        for update in () if self._vectors else self.weight_updates:
            update.check_known()
            if update.inplace:
                warn_saturated(update.layers)
            for layer in update.layers.values():
                update.save(layer, entries)
        return saved

    def _packed(self) -> dict[str, Tensor]:
        """What a state says of all layers where the groups have vectors, see `zero_vectors`."""
        found: dict[str, Tensor] = {}
        for update in self.weight_updates:
            update.check_known()
            for name, layer in update.layers.items():
                pair = layer.lora_A, layer.lora_B
                kept: dict[Tensor, dict[str, Tensor]]
                kept = {p: {"anchor": self._factors[p]["anchor"]} for p in pair}
                with gathered(() if update.owns(layer.delta, layer.lora_B) else pair):
                    update.save(layer, kept)
                found |= pack(name, [kept[p] for p in pair])
        return found

    def _run_state(self) -> dict[str, Any]:
        run = {**super()._run_state(), "w_update": self.w_update}
        return {**run, UPDATES: self._packed()} if self._vectors else run

    def _check_state(self, saved: SavedState) -> None:
        if "format" not in saved.run:
            add_older_updates(saved, self.weight_updates, self.w_update)
        theirs = saved.run.get("w_update")
        if theirs != self.w_update:
            accepted = f"a state of w_update={self.w_update!r}"
            raise ArgumentError("state_dict", f"w_update={theirs!r:.60}", accepted)
        if self._vectors:
            saved.entries |= unpack(saved.run.get(UPDATES), layer_names(self._modules))
        saved.layers = self._layers_of(saved)
        inplace = self.w_update == "inplace"
        for name, layer in saved.layers.items():
            b = layer.lora_B
            for p in () if self._vectors else (layer.lora_A, b):
                saved.entries[p].setdefault("last", p.detach())  # older states lack it
            if inplace:
                weight = take_weight(name, saved.entries[b], layer)
                saved.weights[b] = read_remainder(saved.entries[b], weight, layer)
            update = take_update(name, saved.entries[b], layer, inplace)
            if update is not None:
                saved.updates[b] = update
        super()._check_state(saved)
        for weight_update in self.weight_updates:
            weight_update.check_earlier_run(saved.updates)

    def _layers_of(self, saved: SavedState) -> dict[str, LoraLayer]:
        """The layers whose update the state holds, by name."""
        groups = saved.merged_groups(self.param_groups, self.defaults)
        for group in groups:
            self._check_group(group)
        there = {p for p, entry in saved.entries.items() if "anchor" in entry}
        pairs = self._find_pairs(groups, there)  # as the first step after it will
        groups = self._unflattened(groups) if self._vectors else groups
        found = find_pairs(self._modules, [{**g, "update_ratio": 0.0} for g in groups], there)
        own = {layer.lora_B: name for name, layer in self._pairs.items() if layer.delta is not None}
        lost = sorted(own[b] for b in own.keys() - {layer.lora_B for layer in found.values()})
        if lost:
            given = f"no update of {lost[0]}, because its update_ratio was 0"
            raise ArgumentError("state_dict", given, "a state from after its update began")
        if self._vectors:
            check_complete(pairs, found)
        return found

    def _saved_tensors(self, p: Tensor, saved: SavedState) -> dict[str, Tensor]:
        own = {name: self.state[p][name] for name in ("step", "exp_avg", "exp_avg_sq")}
        for layer in saved.layers.values():
            if p is layer.lora_A or p is layer.lora_B:
                own |= {"anchor": p, "last": p}
            if p is layer.lora_B and self._keeps_remainder(layer):
                w = layer.matrix
                low = torch.empty(w.shape, dtype=REMAINDER_DTYPES[w.dtype], device="meta")
                own["remainder"] = low
        return own

    def _take_state(self, saved: SavedState) -> None:
        for layer in saved.layers.values():
            self._allocate_update(layer)
        self._sent = {b: update.update_ratio for b, update in saved.updates.items()}
        index = self._index
        ratios = [
            {self._last_ratio(m, index) for m in u.layers.values()} for u in self.weight_updates
        ]
        joining = saved.layers.keys() - self._pairs.keys()  # their update_ratio was 0 here
        if joining or self._outdated() or any(len(found) > 1 for found in ratios):
            self._build()
        for layer in saved.layers.values():
            weight = saved.weights.get(layer.lora_B)
            if weight is not None and local(weight).data_ptr() != local(layer.weight).data_ptr():
                copy_values(layer.weight, weight)
        if self._vectors:
            for layer in saved.layers.values():
                for p in (layer.lora_A, layer.lora_B):
                    take_entry(saved.entries.pop(p), self._factors[p])
        super()._take_state(saved)
        self._bound_iteration(saved.number("iteration"))
        for update in self.weight_updates:
            update.set_ratio(self._last_ratio(next(iter(update.layers.values())), index))
        for flag in self._unseen.values():
            flag.zero_()
        self._settings = [None] * len(self.param_groups)  # a lambda may not have been sent yet
        self._bind(saved.updates)
        self._sent = {}
