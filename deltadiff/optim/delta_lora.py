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

from ..checks import HALF_DTYPES, REMAINDER_DTYPES, ROUNDINGS, check_int, check_number
from ..errors import ArgumentError
from ..layers.lora_layers import LoraLayer
from ..layers.pending_delta import LowRankFactors
from ..layers.saturation import warn_saturated
from ..layers.writable import check_writable
from .device_step import AdamWRun, DeviceStep
from .fused_adamw import FusedAdamW
from .old_remainders import renew_remainders
from .param_groups import ModelOrParams, find_pairs, group_indices
from .update_start import UpdateStart
from .weight_update import WeightUpdate

W_UPDATES = ("inplace", "factored")


class DeltaLoRA(FusedAdamW):
    """AdamW with the Delta-LoRA update of the frozen weights (Algorithm 1).

    All trainable parameters get AdamW, as from `FusedAdamW`; those that are a `LoraLinear`'s own
    pair also move its weight. ``update_ratio=0`` is plain LoRA. With updates from the first step
    on, Delta-LoRA under Adam is LoRA with lora_alpha (1 + lambda).

    A step may be captured in a CUDA graph, as with `FusedAdamW`.

    Args:
        model_or_params: a swapped model, or an iterable of parameters, modules or param groups
            (whose "params" may be a module). Groups may set lr, betas, eps, weight_decay,
            update_ratio and start_step.
        lr, betas, eps, weight_decay, skip_nonfinite: as for `FusedAdamW`.
        update_ratio: lambda >= 0. It may change between steps (not from 0): what the old value did
            then stays in the model.
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
    )  # fmt: skip
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
        self._model = model
        self._method_defaults = {"update_ratio": update_ratio, "start_step": start_step}
        super().__init__(
            model_or_params, lr, betas, eps, weight_decay, skip_nonfinite=skip_nonfinite
        )

    # -------------------------------------------------------------------- set-up

    def _check_tensors(self) -> None:
        self._pairs = find_pairs(self._modules, self.param_groups)
        if self.w_update is None:
            in_peft = any(layer.in_peft for layer in self._pairs.values())
            self.w_update = "factored" if in_peft else "inplace"
        super()._check_tensors()
        if self.w_update == "inplace":
            check_writable(self._pairs, self._modules)

    def _prepare(self) -> None:
        groups, index = self.param_groups, group_indices(self.param_groups)
        kinds: dict[tuple[int, torch.device, torch.dtype], dict[str, LoraLayer]]
        kinds = defaultdict(dict)
        for name, layer in self._pairs.items():
            self._allocate_update(layer)
            kinds[index[layer.lora_B], layer.weight.device, layer.weight.dtype][name] = layer
        self.weight_updates = [
            WeightUpdate(
                groups[i], layers, self.w_update == "inplace", self.rounding or "remainder",
                self.seed + number, self.state, self._delta,
            )
            for number, ((i, _, _), layers) in enumerate(kinds.items())
        ]  # fmt: skip
        self._groups_without_update = [g for g in groups if not g["update_ratio"]]
        for device, step in self._devices.items():
            here = [update for update in self.weight_updates if update.device == device]
            step.start = UpdateStart(device, groups, here)
            written = [update for update in here if update.inplace]
            step.weights = [m.weight for update in written for m in update.layers.values()]
        super()._prepare()

    def _allocate_update(self, layer: LoraLayer) -> None:
        for p in (layer.lora_A, layer.lora_B):
            if "anchor" not in self.state[p]:
                self.state[p]["anchor"] = torch.zeros_like(p.detach())
            if self.w_update == "inplace" and p not in self._delta:
                self._delta[p] = torch.zeros_like(self.state[p]["exp_avg"])
        w, state = layer.matrix, self.state[layer.lora_B]
        keeps = self.rounding in (None, "remainder") and self.w_update == "inplace"
        if keeps and w.dtype in HALF_DTYPES and "remainder" not in state:
            low = torch.zeros_like(w.detach(), dtype=REMAINDER_DTYPES[w.dtype])  # W's strides too
            state["remainder"] = low

    def _prepare_run(self, group: dict[str, Any], step: DeviceStep, place: slice) -> AdamWRun:
        params, (_, anchor_now) = step.params[place], step.start.flags_of(group)
        deltas = [self._delta.get(p) for p in params]
        anchors = [self.state[p].get("anchor") for p in params]
        steps = step.steps[place]
        return AdamWRun(group, params, self.state, steps, deltas, anchors, anchor_now)

    # ---------------------------------------------------------------------- step

    def _look(self) -> bool:
        same = all([update.check_layers() for update in self.weight_updates])
        return super()._look() and same

    def _bind(self, restored: dict[Tensor, list[LowRankFactors] | None] | None = None) -> None:
        """Give the layers their `PendingDelta`; ``restored``: see `WeightUpdate.bind`."""
        for update in self.weight_updates:
            update.check_earlier_run(restored)
        t = self._read_iteration()
        for step in self._devices.values():
            step.set_iteration(t)
        for update in self.weight_updates:
            update.bind(t > update.start_step + 1, restored)
        super()._bind()

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

    def _bound_iteration(self, t: Tensor) -> None:
        self._t_least = int(t)
        self._t_most = math.inf if self._captured else self._t_least

    # -------------------------------------------------- values of the param groups

    def send_param_groups(self) -> None:
        """Send what changed in ``param_groups`` to the device, see `FusedAdamW.send_param_groups`.

        Nothing waits for the device, unless update_ratio changed after a step was skipped.

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
        check_int("start_step", group["start_step"], 0)

    def _check_settings(self) -> None:
        super()._check_settings()
        for update in self.weight_updates:
            update.check_settings()
        for group in self._groups_without_update:
            if group["update_ratio"]:
                accepted = "a run that starts with an update ratio above 0"
                raise ArgumentError("update_ratio", f"{group['update_ratio']} after 0", accepted)

    def _send(self, settings: list[tuple]) -> None:
        for update in self.weight_updates:
            if update.ratio != update.group["update_ratio"]:
                update.change_ratio(self._read_iteration())
        super()._send(settings)

    # --------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; with the values of A and B it resumes bit by bit.

        In place, it refers to W and holds its remainder: on disk it has the size of these weights,
        which A and B could give back only rounded otherwise. Where a float16 W has reached the end
        of its range, a warning says so once.
        """
        saved = super().state_dict()
        index = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        past_updates = {
            index[m.lora_B]: m.delta.past_updates
            for update in self.weight_updates
            for m in update.layers.values()
            if m.delta is not None and update.owns(m.delta, m.lora_B)
        }
        written = [update for update in self.weight_updates if update.inplace]
        layers = [m for update in written for m in update.layers.values()]
        for update in written:
            warn_saturated(update.layers)
        saved["state"]["delta_lora"] = {
            "weights": {index[m.lora_B]: m.weight.detach() for m in layers},
            "iteration": next(iter(self._iteration.values())).cpu(),
            "w_update": self.w_update,
            "update_ratio": [update.ratio for update in self.weight_updates],
            "folded": {
                i: None if past is None else [(p.B, p.A, p.in_weight) for p in past]
                for i, past in past_updates.items()
            },
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; dtypes and devices stay those of this optimizer.

        Raises:
            ArgumentError: the state is not one of DeltaLoRA, of another w_update, of other groups,
                of parameters or weights of other shapes, or from a version that did not save W;
                nothing was changed.
            SwapError: an earlier run's update would be lost, as in `step`; nothing was changed.
        """
        extra = state_dict["state"].get("delta_lora")
        if extra is None or extra["w_update"] != self.w_update:
            given = "no Delta-LoRA state" if extra is None else f"w_update={extra['w_update']!r}"
            raise ArgumentError("state_dict", given, f"a state of w_update={self.w_update!r}")
        if len(extra["update_ratio"]) != len(self.weight_updates):
            given = f"{len(extra['update_ratio'])} update ratios"
            raise ArgumentError("state_dict", given, str(len(self.weight_updates)))
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        known = dict(zip(ids, params, strict=False))  # `FusedAdamW.load_state_dict` compares them
        foreign = sorted(extra["folded"].keys() - known.keys())
        if foreign:
            raise ArgumentError("state_dict", f"past updates of {foreign}", "those of its groups")
        updated = {m.lora_B: m for u in self.weight_updates if u.inplace for m in u.layers.values()}
        layers = {i: updated[p] for i, p in known.items() if p in updated}
        state_dict = renew_remainders(state_dict, layers)
        weights = self._saved_weights(state_dict["state"]["delta_lora"], known)
        restored: dict[Tensor, list[LowRankFactors] | None] = {}
        for i, past in extra["folded"].items():
            p = known[i]
            kept = [LowRankFactors(b.to(p.device), a.to(p.device), w) for b, a, w in past or ()]
            restored[p] = None if past is None else kept
        for update in self.weight_updates:
            update.check_earlier_run(restored)
        super().load_state_dict(state_dict)
        with torch.no_grad():
            for own, stored in weights:
                own.copy_(stored)
        self._set_iteration(extra["iteration"])
        self._bound_iteration(extra["iteration"])
        for update, ratio in zip(self.weight_updates, extra["update_ratio"], strict=True):
            update.set_ratio(ratio)
        self._settings = [None] * len(self.param_groups)  # a lambda may not have been sent yet
        self._bind(restored)

    def _saved_weights(
        self, extra: dict[str, Any], known: dict[int, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """The weights that are written in place, each with what the state holds of it, if other.

        Raises:
            ArgumentError: the state lacks a weight, or has it in another shape or dtype.
        """
        stored = {known[i]: w for i, w in extra.get("weights", {}).items() if i in known}
        pairs = []
        for update in self.weight_updates:
            for name, layer in update.layers.items() if update.inplace else ():
                w, saved = layer.weight, stored.get(layer.lora_B)
                if saved is None or (saved.shape, saved.dtype) != (w.shape, w.dtype):
                    form = "none" if saved is None else f"{tuple(saved.shape)} of {saved.dtype}"
                    accepted = f"{tuple(w.shape)} of {w.dtype}, as in this model"
                    raise ArgumentError(f"weight of {name} in state_dict", form, accepted)
                if saved.data_ptr() != w.data_ptr():
                    pairs.append((w, saved))
        return pairs

    def _to_copy(self) -> dict[str, Any]:
        # A lambda that no step has seen yet lies in the param group alone. The copy's next step
        # ends the update by the last one, as ours does.
        updates = self.weight_updates
        sent = {m.lora_B: update.ratio for update in updates for m in update.layers.values()}
        return {**super()._to_copy(), "sent": sent}

    def _become_copy(self, attributes: dict[str, Any]) -> None:
        sent = attributes.pop("sent")
        super()._become_copy(attributes)
        for update in self.weight_updates:
            update.set_ratio(next(sent[m.lora_B] for m in update.layers.values()))
