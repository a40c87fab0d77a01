"""`DeltaLoRA`: AdamW on the low-rank pairs, and W += lambda s (B'A' - BA), in one `step()`.

One step is Algorithm 1 of the Delta-LoRA paper, for iteration t = 0, 1, ...:

    A', B' = AdamW(A, B)
    if t > K:  W += lambda s (B'A' - BA)

The updates telescope: their sum is lambda s (B_T A_T - B_k A_k), so "factored" reaches the same
model without writing W (see `PendingDelta`). t counts the steps that were not skipped and lies on
the device, see `fused_adamw`; the host keeps bounds of it to save launches.
"""

import math
from collections import defaultdict
from collections.abc import Collection
from operator import itemgetter
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, REMAINDER_DTYPES, ROUNDINGS, check_int, check_number
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..layers.saturation import warn_saturated
from ..layers.saved_update import SavedUpdate
from ..layers.writable import check_writable
from ..ranks import copy_values, gathered, local
from .device_step import AdamWRun, DeviceStep
from .fused_adamw import FusedAdamW
from .older_updates import add_older_updates
from .param_groups import ModelOrParams, find_pairs, group_indices, layer_names
from .saved_state import SavedState, take_entry, take_update
from .saved_weight import read_remainder, take_weight
from .shards import to_launch
from .update_start import UpdateStart
from .update_state import allocate_factor, allocate_remainder
from .weight_update import WeightUpdate, check_rounding
from .zero_vectors import (
    UPDATES,
    WatchedGroup,
    check_complete,
    check_update,
    check_vectors,
    give_updates,
    holds_vectors,
    pack,
    unpack,
)

W_UPDATES = ("inplace", "factored")
# Param group, device and dtype of W, and lambda.
Kind = tuple[int, torch.device, torch.dtype, float]


class DeltaLoRA(FusedAdamW):
    """AdamW with the Delta-LoRA update of the frozen weights (Algorithm 1).

    All trainable parameters get AdamW, as from `FusedAdamW`; those that are a `LoraLinear`'s own
    pair also move its weight. ``update_ratio=0`` is plain LoRA. With updates from the first step
    on, Delta-LoRA under Adam is LoRA with lora_alpha (1 + lambda).

    A step may be captured in a CUDA graph, as with `FusedAdamW`.

    Under DeepSpeed's ZeRO a factored update works, made before `deepspeed.initialize` with one
    param group: see `zero_vectors`.

    Args:
        model_or_params: a swapped model, or an iterable of parameters, modules or param groups
            (whose "params" may be a module). Groups may set lr, betas, eps, weight_decay,
            update_ratio and start_step.
        lr, betas, eps, weight_decay, skip_nonfinite: as for `FusedAdamW`.
        update_ratio: lambda >= 0. It may change between steps: what the old value did then stays
            in the model.
        start_step: K, an int >= 0; W is updated where t > K, so K = 0 skips the first step.
        w_update: "inplace" writes W (Algorithm 1); "factored" does not, and adds the same update
            in the forward pass, also for a weight that cannot be written. None is "inplace", but
            "factored" for PEFT's layers, whose base weights PEFT still needs as they were.
        rounding: of a 16-bit W: "remainder" (default; 2 bytes an element), "stochastic" or
            "nearest" (warns once, with the share of the update that is lost). A wider W needs none.
        seed: of the random bits of "stochastic".
        model: where ``model_or_params`` holds bare parameters, the model they belong to.

    Raises:
        ArgumentTypeError, ArgumentError: an argument that cannot be used, by name; a weight that
            cannot be written in place (quantised, tied, shared, expanded); parameters without a
            swapped layer; a layer with dropout whose weight is to be updated.
        SwapError: (in `step`) the model was un-swapped or merged; or this run is factored, and so
            was the last one, over weights that hold more values of lambda than are kept.
    """

    _copied = (
        *FusedAdamW._copied, "w_update", "rounding", "seed", "_t_least", "_t_most", "_delta",
        "_unseen", "_sent", "_pairs", "_own_params", "_vectors", "_of_vectors",
    )  # fmt: skip
    _methods = ("DeltaLoRA",)
    _settings_of = itemgetter("betas", "eps", "weight_decay", "update_ratio", "start_step")

    def __init__(
        self,
        model_or_params: ModelOrParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        update_ratio: float = 0.5,
        start_step: int = 0,
        w_update: str | None = None,
        rounding: str | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
        model: nn.Module | None = None,
    ):
        if w_update not in (None, *W_UPDATES):
            raise ArgumentError("w_update", repr(w_update), f"None, {' or '.join(W_UPDATES)}")
        if rounding not in (None, *ROUNDINGS):
            raise ArgumentError("rounding", repr(rounding), f"None, {', '.join(ROUNDINGS)}")
        if not isinstance(seed, int) or not 0 <= seed < 2**62:
            raise ArgumentError("seed", repr(seed), "an int from 0 to 2**62 - 1")
        self.w_update, self.rounding, self.seed = w_update, rounding, seed
        self._t_least: int = 0  # bounds of the iteration on the device
        self._t_most: float = 0
        self._delta: dict[Tensor, Tensor] = {}  # A' - A and B' - B of the current step
        self._unseen: dict[Tensor, Tensor] = {}  # see `PendingDelta`
        self._sent: dict[Tensor, float] = {}  # lambda of the last step, while a state is loaded
        self._pairs: dict[str, LoraLayer] = {}
        self._own_params: list[list[Tensor]] = []  # of each group, before there were vectors
        self._vectors = False  # whether the groups hold vectors of DeepSpeed's ZeRO by now
        self._of_vectors: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # then, see `_factors`
        self._model = model
        self._method_defaults = {"update_ratio": update_ratio, "start_step": start_step}
        super().__init__(
            model_or_params, lr, betas, eps, weight_decay, skip_nonfinite=skip_nonfinite
        )

    # -------------------------------------------------------------------- set-up

    def _find_pairs(
        self, groups: list[dict[str, Any]], kept: Collection[Tensor] = ()
    ) -> dict[str, LoraLayer]:
        """The layers that are updated with these groups; raises where one cannot be."""
        held = group_indices(groups)
        vectors = bool(self._own_params) and holds_vectors(self._modules, held)
        if vectors:
            check_vectors(self._modules, held, len(self._own_params), self.skip_nonfinite)
            groups = self._unflattened(groups)
        states = self._of_vectors if vectors else self.state
        begun = {p for p, state in states.items() if "anchor" in state}
        pairs = find_pairs(self._modules, groups, begun | {*kept})
        if vectors:
            check_update(pairs, held, self.w_update)
        if self.w_update == "inplace":
            check_writable(pairs, self._modules)
            check_rounding(pairs, self.rounding)
        return pairs

    def _build(self) -> None:
        if self.w_update is None:
            in_peft = any(layer.in_peft for layer in layer_names(self._modules))
            self.w_update = "factored" if in_peft else "inplace"
        if self.w_update == "factored":
            groups, taken = self.param_groups, WeakMethod(self._give_updates)
            groups[:] = [g if type(g) is WatchedGroup else WatchedGroup(g, taken) for g in groups]
        super()._build()

    def _give_updates(self, group: dict[str, Any]) -> None:
        give_updates(group, layer_names(self._modules), self._pairs)

    def _check_tensors(self) -> None:
        pairs = self._find_pairs(self.param_groups)
        super()._check_tensors()
        self._pairs = pairs
        held = group_indices(self.param_groups)
        self._vectors = bool(self._own_params) and holds_vectors(self._modules, held)
        if not self._vectors:
            self._own_params = [list(group["params"]) for group in self.param_groups]

    def _unflattened(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Groups of vectors with the parameters that these stand for."""
        own = zip(groups, self._own_params, strict=True)
        return [{**group, "params": params} for group, params in own]

    @property
    def _index(self) -> dict[Tensor, int]:
        """Each parameter of the model with the index of its group."""
        groups = self.param_groups
        return group_indices(self._unflattened(groups) if self._vectors else groups)

    @property
    def _factors(self) -> dict[Tensor, dict[str, Any]]:
        """What the update keeps of each lora_A and lora_B; ``state`` has it but under ZeRO."""
        return self._of_vectors if self._vectors else self.state

    def _last_ratio(self, layer: LoraLayer, index: dict[Tensor, int]) -> float:
        """The lambda of the last step; before any, the group's."""
        b, delta = layer.lora_B, layer.delta
        if b in self._sent:
            return self._sent[b]
        if delta is not None and delta.anchor_B is self._factors[b].get("anchor"):
            return delta.update_ratio
        return self.param_groups[index[b]]["update_ratio"]

    def _prepare(self) -> None:
        groups, index, factors = self.param_groups, self._index, self._factors
        kinds: dict[Kind, dict[str, LoraLayer]] = defaultdict(dict)
        for name, layer in self._pairs.items():
            self._allocate_update(layer)
            w, ratio = layer.weight, self._last_ratio(layer, index)
            kinds[index[layer.lora_B], w.device, w.dtype, ratio][name] = layer
        for step in self._devices.values():
            for p, flag in zip(step.params, step.moved, strict=True):
                if p in self._unseen:
                    flag.copy_(self._unseen[p])
                self._unseen[p] = flag
            step.copies = [self.state[p].get("last") for p in step.params]
        self.weight_updates = [
            WeightUpdate(
                groups[i], layers, ratio, self.w_update == "inplace", self.rounding or "remainder",
                self.seed + number, factors, self._delta, self._unseen,
            )
            for number, ((i, _, _, ratio), layers) in enumerate(kinds.items())
        ]  # fmt: skip
        self._groups_without_update = [g for g in groups if not g["update_ratio"]]
        for device, step in self._devices.items():
            here = [update for update in self.weight_updates if update.device == device]
            step.start = UpdateStart(device, groups, here)
            written = [update for update in here if update.inplace]
            step.weights = [m.weight for update in written for m in update.layers.values()]
        super()._prepare()

    def _allocate_update(self, layer: LoraLayer) -> None:
        inplace = self.w_update == "inplace"
        for p in (layer.lora_A, layer.lora_B):
            allocate_factor(p, self._factors[p], self._delta if inplace else None)
        allocate_remainder(layer, self._factors[layer.lora_B], self._keeps_remainder(layer))

    def _keeps_remainder(self, layer: LoraLayer) -> bool:
        keeps = self.rounding in (None, "remainder") and self.w_update == "inplace"
        return keeps and layer.weight.dtype in HALF_DTYPES

    def _prepare_run(self, group: dict[str, Any], step: DeviceStep, place: slice) -> AdamWRun:
        params, (_, anchor_now) = step.params[place], step.start.flags_of(group)
        kept = (
            [self._delta.get(p) for p in params],
            [self.state[p].get("anchor") for p in params],
            step.copies[place],
        )
        deltas, anchors, copies = ([t if t is None else to_launch(t) for t in ts] for ts in kept)
        moved = step.moved[place] if any(copy is not None for copy in copies) else None
        return AdamWRun(
            group, step.tensors[place], self._moments(step, place), step.steps[place],
            deltas, anchors, anchor_now, copies, moved,
        )  # fmt: skip

    # ---------------------------------------------------------------------- step

    def _look(self) -> bool:
        same = super()._look()  # it puts sharded parameters back, which the layers then hold
        return all([update.check_layers() for update in self.weight_updates]) and same

    def _bind(self, restored: dict[Tensor, SavedUpdate] | None = None) -> None:
        """Give the layers their `PendingDelta`; ``restored``: see `WeightUpdate.bind`."""
        for update in self.weight_updates:
            update.check_earlier_run(restored)
        t = self._read_iteration()
        for step in self._devices.values():
            step.set_iteration(t)
        begin = [m for u in self.weight_updates for m in u.layers.values()]
        begin = [m for m in begin if restored is None or m.lora_B not in restored]
        with gathered(p for m in begin for p in (m.lora_A, m.lora_B)):
            for update in self.weight_updates:
                update.bind(t > update.start_step + 1, restored)
        super()._bind()
        if self._vectors and restored is not None:  # ZeRO restores the pairs after its optimizer
            for update in self.weight_updates:
                update.follow_vectors(None)
        elif restored is None or not any(update.has_moved() for update in self.weight_updates):
            self._accept_writes()

    def _follow_writes(self) -> None:
        """Follow pairs that were written since the last step; see `WeightUpdate.follow_pairs`."""
        for update in self.weight_updates:
            update.check_can_end("lora_A and lora_B", only_moved=True)
            update.check_earlier_run(None)
        t = self._read_iteration()
        for update in self.weight_updates:
            update.follow_pairs(t)

    def _before_adamw(self) -> None:
        """Take the anchors of updates that start in this step, where AdamW has vectors."""
        for update in self.weight_updates if self._vectors else ():
            start = update.start_step + 1
            t = self._read_iteration() if self._t_least <= start <= self._t_most else None
            update.follow_vectors(t)

    def _after_adamw(
        self, found_inf: dict[torch.device, Tensor], capturing: bool
    ) -> set[torch.device]:
        """Update the weights."""
        wrote: set[torch.device] = set()
        for update in self.weight_updates:
            t, flag = self._iteration[update.device], found_inf.get(update.device)
            if update.run(t, self._t_least, self._t_most, flag, capturing):
                wrote.add(update.device)
        if capturing:
            self._t_most = math.inf
        else:
            self._t_most += 1
            self._t_least += not found_inf
        return wrote

    def _read_iteration(self) -> int:
        """t, for set-up and changes of lambda: asks the device only where steps were skipped."""
        if self._t_least != self._t_most:
            self._bound_iteration(next(iter(self._iteration.values())))
        return self._t_least

    def _bound_iteration(self, t: Tensor | int) -> None:
        self._t_least = int(t)
        self._t_most = math.inf if self._captured else self._t_least

    # -------------------------------------------------- values of the param groups

    def send_param_groups(self) -> None:
        """Send what changed in ``param_groups`` to the device, see `FusedAdamW.send_param_groups`.

        Nothing waits for the device, unless update_ratio changed.

        Raises:
            ArgumentError: as there; a changed update_ratio with w_update "factored", where the
                forward pass changes its form, or without Triton's kernels.
        """
        for update in self.weight_updates:
            ratio = update.group["update_ratio"]
            follows = update.inplace and update.backend == "triton"
            if self._captured and not follows and update.ratio != ratio:
                accepted = "the captured one; this path needs a new capture for another"
                raise ArgumentError("update_ratio", ratio, accepted)
        super().send_param_groups()

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("update_ratio", group["update_ratio"], 0)
        check_int("start_step", group["start_step"], 0, bits=63)

    def _check_settings(self) -> None:
        super()._check_settings()
        for update in self.weight_updates:
            start = update.group["start_step"]
            if start != update.start_step and self._t_most and update.begun():
                given, accepted = f"{start} after {update.start_step}", "one value for a whole run"
                raise ArgumentError("start_step", given, accepted)
            if update.ratio != update.group["update_ratio"]:
                update.check_can_end("update_ratio", only_moved=False)
        if self._outdated():
            self._find_pairs(self.param_groups)

    def _outdated(self) -> bool:
        """As there; also for another start_step, and for a lambda that was 0 till now."""
        return (
            super()._outdated()
            or any(group["update_ratio"] for group in self._groups_without_update)
            or any(
                update.start_step != update.group["start_step"] for update in self.weight_updates
            )
        )

    def _send(self, settings: list[tuple]) -> None:
        changed = [u for u in self.weight_updates if u.ratio != u.group["update_ratio"]]
        with gathered(p for update in changed for p in update.factors()):
            for update in changed:
                update.change_ratio(self._read_iteration())
        super()._send(settings)

    # --------------------------------------------------------------- checkpoints

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
