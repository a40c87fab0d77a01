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
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import ROUNDINGS, check_int, check_number
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..layers.saved_update import SavedUpdate
from ..ranks import gathered
from .delta_lora_state import DeltaLoRAState
from .device_step import AdamWRun, DeviceStep
from .param_groups import ModelOrParams
from .shards import to_launch
from .update_start import UpdateStart
from .weight_update import WeightUpdate

W_UPDATES = ("inplace", "factored")
# Param group, device and dtype of W, and lambda.
Kind = tuple[int, torch.device, torch.dtype, float]


class DeltaLoRA(DeltaLoRAState):
    """AdamW with the Delta-LoRA update of the frozen weights (Algorithm 1).

    All trainable parameters get AdamW, as from `FusedAdamW`; those that are a `LoraLinear`'s own
    pair also move its weight. ``update_ratio=0`` is plain LoRA. With updates from the first step
    on, Delta-LoRA under Adam is LoRA with lora_alpha (1 + lambda).

    A step may be captured in a CUDA graph, as with `FusedAdamW`.

    Under DeepSpeed's ZeRO a factored update works, made before `deepspeed.initialize` with one
    param group, and goes on from universal checkpoints, too: see `zero_vectors`.

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

    _copied = (*DeltaLoRAState._copied, "seed", "_t_least", "_t_most", "_unseen")
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
        self._unseen = {}
        self._model = model
        self._method_defaults = {"update_ratio": update_ratio, "start_step": start_step}
        super().__init__(
            model_or_params, lr, betas, eps, weight_decay, skip_nonfinite=skip_nonfinite
        )

    # -------------------------------------------------------------------- set-up

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
