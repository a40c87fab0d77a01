"""`WeightLaunches`: W += lambda s (B'A' - BA) for the layers of one kind, in one launch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, HALF_DTYPES, NO_ROUNDING
from ..errors import ArgumentError, SwapError
from ..layers.lora_layers import LoraLayer
from ..layers.pending_delta import PendingDelta
from ..ops.delta_update import prepare_delta_update
from ..ops.dispatch import choose_path
from ..ranks import first_row, is_sharded, local, own_part
from .rounding_loss import LayerUpdate, RoundingLoss
from .shards import WholeFactors


class WeightLaunches:
    """The Delta-LoRA update of layers whose weights have one param group, device and dtype.

    Args:
        group: the param group; its "update_ratio" may change between steps.
        layers: the layers by name.
        ratio: the lambda that the last step used; the group's may be newer.
        inplace: whether W is written; else the forward pass adds the update.
        rounding: of a 16-bit W.
        seed: of the random bits of "stochastic".
        state: the optimizer's; holds "anchor", "last" and "remainder".
        delta: A' - A and B' - B of the current step, by parameter.
        unseen: by parameter a number on the device, see `PendingDelta`.

    Attributes:
        ratio: the lambda that the launches use, until `WeightUpdate.change_ratio`.
        started: 0-dim on the device, whether t > K; given by `UpdateStart`, as are the next two.
        rank_scales: rank to the factors that the layers of this rank share.
        rank_scales_after: rank to what these become when the updates start.
    """

    def __init__(
        self,
        group: dict[str, Any],
        layers: dict[str, LoraLayer],
        ratio: float,
        inplace: bool,
        rounding: str,
        seed: int,
        state: dict[Tensor, dict[str, Tensor]],
        delta: dict[Tensor, Tensor],
        unseen: dict[Tensor, Tensor],
    ):
        w = next(iter(layers.values())).weight
        self.group, self.layers, self.inplace, self.seed = group, layers, inplace, seed
        self.state, self.delta, self.unseen, self.device = state, delta, unseen, w.device
        self.rounding = rounding if w.dtype in HALF_DTYPES else NO_ROUNDING
        self.start_step, self.ratio = group["start_step"], ratio
        weight_dtype = w.dtype if w.dtype in DTYPES else torch.float32
        self.backend = choose_path(w.device, weight_dtype).backend
        self.started: Tensor
        self.rank_scales: dict[int, Tensor] = {}
        self.rank_scales_after: dict[int, Tensor] = {}
        self._launches: list = []
        self._wholes: WholeFactors | None = None
        self._launched = False
        self._loss = RoundingLoss() if self.rounding == "nearest" else None
        self._prepare()

    def _prepare(self) -> None:
        """Gather the tensors of the launches: one for each dtype of adapters, so usually one."""
        # `check_layers` reads these in every step; asking the modules takes ten times as long.
        self._places = [place for m in self.layers.values() for place in m.places()]
        sharded = [m.lora_A for m in self.layers.values() if is_sharded(m.lora_A)]
        self._gathers_anchors = bool(sharded) and not self.inplace
        if not self.inplace:
            return
        if sharded:
            by_inputs = [m.lora_B for m in self.layers.values() if _split_by_inputs(m)]
            sharded += [b for b in by_inputs if is_sharded(b)]
            self._wholes = WholeFactors(sharded, [self.delta[p] for p in sharded])
        position = {m: i for i, m in enumerate(self.layers.values())}
        for dtype in dict.fromkeys(m.lora_A.dtype for m in self.layers.values()):
            layers = [m for m in self.layers.values() if m.lora_A.dtype == dtype]
            layers = [m for m in layers if local(m.weight).numel()]  # a process may hold no row
            if not layers:
                continue
            low = []
            if self.rounding == "remainder":
                low = [local(self.state[m.lora_B]["remainder"]) for m in layers]
            updates = [self._update_of(m) for m in layers]
            launch = prepare_delta_update(
                self.backend,
                [u.weight for u in updates],
                [u.lora_A for u in updates],
                [u.lora_B for u in updates],
                [u.delta_A for u in updates],
                [u.delta_B for u in updates],
                [u.scale for u in updates],
                self.rounding,
                low,
                self.seed,
                [position[m] for m in layers],
                [0 if _split_by_inputs(m) else first_row(m.weight) for m in layers],
            )
            self._launches.append((launch, layers))

    def _update_of(self, layer: LoraLayer) -> LayerUpdate:
        w, a, b = layer.weight, layer.lora_A.detach(), local(layer.lora_B.detach())
        delta_a, delta_b = self.delta[layer.lora_A], self.delta[layer.lora_B]
        if self._wholes is not None and is_sharded(layer.lora_A):
            a, delta_a = self._wholes.of(layer.lora_A)
            if _split_by_inputs(layer):
                b, delta_b = self._wholes.of(layer.lora_B)
                a, delta_a = own_part(a.T, w).T, own_part(delta_a.T, w).T
        scale = self.ratio * self.scaling_of(layer)
        return LayerUpdate(local(layer.matrix), a, b, delta_a, delta_b, scale)

    def scaling_of(self, layer: LoraLayer) -> float:
        """s of the layer when this run began, see `PendingDelta.scaling`."""
        delta = layer.delta
        own = delta is not None and self.owns(delta, layer.lora_B)
        return delta.scaling if delta is not None and own else layer.scaling

    def owns(self, delta: PendingDelta | None, lora_B: Tensor) -> bool:
        """Whether ``delta`` was made by this optimizer, not by an earlier run or from a file."""
        return delta is not None and delta.anchor_B is self.state[lora_B]["anchor"]

    def check_layers(self) -> bool:
        """Whether every layer still has the weight that it had at construction.

        Raises:
            SwapError: a layer was un-swapped or merged.
        """
        if not [key for holder, key, value in self._places if holder.get(key) is not value]:
            return True
        for name, layer in self.layers.items():
            if not layer.swapped_in:
                raise SwapError(name, "a layer that was un-swapped or merged", "a swapped layer")
        return False

    def run(
        self, t: Tensor, t_least: int, t_most: float, found_inf: Tensor | None, capturing: bool
    ) -> bool:
        """Update the weights in iteration ``t``, which is on the device.

        ``t_least``, ``t_most``: bounds of t that the host knows. Returns whether weights may have
        been written.
        """
        if self._gathers_anchors and t_least <= self.start_step + 1 <= t_most:
            for layer in self.layers.values():  # this step writes the anchors, or may do so
                if layer.delta is not None:
                    layer.delta.forget_anchors()
        if not self.inplace or (not self.ratio and not capturing):
            return False
        early = t_most <= self.start_step and not capturing  # a graph is replayed later
        # The first launch on a GPU comes before it is needed: a capture must not have to compile.
        if early and (self._launched or self.device.type == "cpu"):
            return False
        known = t_least > self.start_step and not capturing and self.backend != "triton"
        apply = None if known else self.started  # Triton gets one form, so that it compiles once
        if found_inf is not None:
            apply = self.started * (found_inf.view(()) == 0)
        if self._wholes is not None:
            self._wholes()
        if self._loss is not None and not self._loss.told and not early and not capturing:
            mine = (m for _, layers in self._launches for m in layers)
            self._loss.measure(map(self._update_of, mine))
        for launch, _ in self._launches:
            launch(t, apply)
        self._launched = True
        return True

    def set_ratio(self, ratio: float) -> None:
        """Let the launches use another lambda from now on."""
        self.ratio = ratio
        for launch, layers in self._launches:
            launch.rescale([ratio * self.scaling_of(m) for m in layers])


def _split_by_inputs(layer: LoraLayer) -> bool:
    """Whether a process holds some columns of W: a Conv1D's weight is (in, out)."""
    return layer.transposed and is_sharded(layer.weight)


def check_rounding(layers: Mapping[str, LoraLayer], rounding: str | None) -> None:
    """Raise ArgumentError where a rounding cannot be had for W of one of these layers.

    Raises:
        SwapError: W has become another one than its remainder belongs to.
    """
    for name, layer in layers.items():
        if layer.delta is not None:
            layer.delta.check_remainder(name, layer.weight)
        if rounding == "stochastic" and _split_by_inputs(layer):
            if layer.weight.dtype in HALF_DTYPES:
                given = f"'stochastic' for {name}, a Conv1D's weight sharded along its inputs"
                raise ArgumentError("rounding", given, "'remainder' or 'nearest'")
