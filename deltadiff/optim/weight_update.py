"""`WeightUpdate`: the launch that updates the layers of one kind, and what it made of them.

It knows when the updates of its layers start, gives each layer its `PendingDelta`, and takes over
what an earlier run, an adapter file or an earlier lambda left there.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import ArgumentError, SwapError
from ..layers.lora_layers import LoraLayer
from ..layers.low_rank_factors import LowRankFactors
from ..layers.low_rank_sum import check_known
from ..layers.pending_delta import MAX_PAST_UPDATES, PendingDelta
from ..layers.saved_update import SavedUpdate, write_update
from ..ops.delta_update import delta_update_
from ..ranks import copy_values, local
from .saved_weight import remainder_to_bytes
from .weight_launches import WeightLaunches


class WeightUpdate(WeightLaunches):
    """The Delta-LoRA update of some layers, from one step to the next; see `WeightLaunches`."""

    # ---------------------------------------------------------------------- a step

    def follow_vectors(self, t: int | None) -> None:
        """Before AdamW of vectors that ZeRO put in the place of pairs, see `zero_vectors`.

        ``t``: the iteration; None where it is known that the updates do not start in it.
        """
        for layer in self.layers.values():
            delta = layer.delta
            assert delta is not None  # `bind` gave it
            if t == self.start_step + 1:
                delta.begin_from_last()
            delta.expect(layer.lora_A, layer.lora_B)

    def factors(self) -> list[Tensor]:
        """The pairs of the layers."""
        return [p for m in self.layers.values() for p in (m.lora_A, m.lora_B)]

    # ------------------------------------------------ another lambda, another pair

    def check_can_end(self, argument: str, only_moved: bool) -> None:
        """Raise where the update so far cannot be kept, as a factored one must be.

        Args:
            argument: what makes it end, for the error.
            only_moved: whether it ends for layers alone whose pair moved.
        """
        for name, layer in self.layers.items() if not self.inplace else ():
            delta = layer.delta
            if delta is None or not self.owns(delta, layer.lora_B) or not delta.started():
                continue
            if only_moved and not delta.differs(layer.lora_A, layer.lora_B):
                continue
            past = delta.past_updates
            if past is None or len(past) >= MAX_PAST_UPDATES:
                given = f"change number {MAX_PAST_UPDATES + 1} of lambda, or of the pair of {name}"
                accepted = f"at most {MAX_PAST_UPDATES} changes while w_update is 'factored'"
                raise ArgumentError(argument, given, accepted)
            check_known(name, delta)

    def check_known(self) -> None:
        """Raise SwapError where the forward pass adds an update that is not known any more."""
        for name, layer in self.layers.items() if not self.inplace else ():
            delta = layer.delta
            if delta is not None and self.owns(delta, layer.lora_B):
                if delta.past_updates is not None and not delta.known():
                    check_known(name, delta)

    def has_moved(self) -> bool:
        """Whether a pair is another than the last step left; reads from the device."""
        layers = self.layers.values()
        return any(m.delta is not None and m.delta.differs(m.lora_A, m.lora_B) for m in layers)

    def change_ratio(self, t: int) -> None:
        """Follow the group's lambda in iteration ``t``.

        The updates by the old value stay as a finished product, and the anchors move up.
        """
        ratio = self.group["update_ratio"]
        for layer in self.layers.values():
            delta = layer.delta
            assert delta is not None  # `bind` gave it
            delta.end_update(layer.lora_A, layer.lora_B)
            delta.update_ratio = ratio
        self._fill_rank_scales(ratio, t > self.start_step + 1)
        self.set_ratio(ratio)

    def _fill_rank_scales(self, ratio: float, started: bool) -> None:
        for r, now in self.rank_scales.items():
            after = self.rank_scales_after[r]
            after.copy_(PendingDelta.make_rank_scale(ratio, r, now, True))
            now.copy_(PendingDelta.make_rank_scale(ratio, r, now, started))

    def follow_pairs(self, t: int) -> None:
        """Follow pairs that something else wrote since the last step, before iteration ``t``.

        Their updates end, and others begin from where the pairs are now. A layer whose update is
        another optimizer's by now, or none, joins this run again.
        """
        for layer in self.layers.values():
            delta = layer.delta
            if delta is None or not self.owns(delta, layer.lora_B):
                self._join(layer, t > self.start_step + 1)
            elif delta.differs(layer.lora_A, layer.lora_B):
                delta.end_update(layer.lora_A, layer.lora_B)
        self.set_ratio(self.ratio)  # a layer that joined may have another scaling

    # ------------------------------------------------- what earlier steps left in W

    def bind(self, started: bool, restored: dict[Tensor, SavedUpdate] | None = None) -> None:
        """Give each layer its `PendingDelta`.

        Args:
            started: whether W was updated before.
            restored: what a state that was loaded says of past updates, by lora_B. A layer is not
                among them if the state was saved before its first step: such a layer, and with None
                every layer, starts a run, which takes over what it finds.
        """
        self._fill_rank_scales(self.ratio, started)
        for layer in self.layers.values():
            b, before = layer.lora_B, layer.delta
            if restored is not None and b in restored:  # with W, it says all that there is
                saved = restored[b]
                delta = layer.delta = self._new_delta(layer, saved.scaling)
                delta.past_updates = saved.past_updates
                self._write(layer, delta)
            elif before is None or restored is not None or not self.owns(before, b):
                if before is not None and self.owns(before, b):
                    layer.delta = None  # what was done since then is taken back
                self._join(layer, started)
            else:
                delta = layer.delta = self._new_delta(layer, before.scaling)
                delta.past_updates = before.past_updates
                if delta.differs(layer.lora_A, b):
                    delta.end_update(layer.lora_A, b)
        self.set_ratio(self.ratio)  # a layer may have joined with another scaling

    def _new_delta(self, layer: LoraLayer, scaling: float) -> PendingDelta:
        a, b = layer.lora_A, layer.lora_B
        delta = PendingDelta(
            self.state[a]["anchor"], self.state[b]["anchor"], self.state[a]["last"],
            self.state[b]["last"], self.ratio, scaling, self.rank_scales[layer.r],
            in_weight=self.inplace, remainder=self.state[b].get("remainder"),
            remainder_of=layer.weight.dtype, unseen=(self.unseen[a], self.unseen[b]),
        )  # fmt: skip
        delta.follow_shards(a, b)
        return delta

    def _join(self, layer: LoraLayer, started: bool) -> None:
        """Begin the update of a layer, or begin it again, with the pair as it is now."""
        before, a, b = layer.delta, layer.lora_A, layer.lora_B
        if before is not None:  # another optimizer's, which notices by this that it has to join
            increment_version([local(a), local(b)])
        delta = layer.delta = self._new_delta(layer, layer.scaling)
        delta.take_pair(a, b)
        for flag in delta.unseen:
            flag.zero_()
        if started:
            delta.anchor_A.copy_(a)
            delta.anchor_B.copy_(b)
            delta.forget_anchors()
        if before is not None:
            self._take_over(layer, before, delta)

    def check_earlier_run(self, restored: dict[Tensor, SavedUpdate] | None) -> None:
        """Raise where `bind` could not keep what an earlier run left; ``restored``: as there.

        Raises:
            SwapError: the forward pass adds the update of that run, this run's update would be
                added beside it, and the list that keeps such updates was given up (it is None).
        """
        for name, layer in self.layers.items():
            before, b = layer.delta, layer.lora_B
            if before is None or before.in_weight or before.known():
                continue
            starts_run = not self.owns(before, b) and b not in (restored or {})
            if starts_run and not self.inplace and before.started():
                given = "a factored update after too many values of update_ratio to be kept"
                accepted = "`merge_` and `swap_` before the next run, or w_update='inplace' in it"
                raise SwapError(name, given, accepted)

    def begun(self) -> bool:
        """Whether a step of this run has given a layer its update."""
        return any(self.owns(m.delta, m.lora_B) for m in self.layers.values())

    def _take_over(self, layer: LoraLayer, before: PendingDelta, delta: PendingDelta) -> None:
        """Keep in ``delta`` what ``before`` says is part of the model; W gets what it may hold."""
        if before.remainder is not None and delta.remainder is not None:
            copy_values(delta.remainder, before.remainder)
        delta.past_updates = before.all_updates()
        # Of what is not known as factors W holds all but the update that goes on.
        self._write(layer, delta, before.unwritten() if delta.past_updates is None else None)

    def _write(
        self, layer: LoraLayer, delta: PendingDelta, parts: list[LowRankFactors] | None = None
    ) -> None:
        """Write past updates that W does not hold yet, if it may; None: all of them."""
        for p in delta.unwritten_past() if parts is None else parts:
            if not delta.in_weight or p.in_weight:
                continue
            delta_update_(
                layer.matrix, p.A, p.B, torch.zeros_like(p.A), p.B, scale=1.0,
                rounding=self.rounding, remainder=delta.remainder, seed=self.seed,
            )  # fmt: skip
            p.in_weight = True

    def save(self, layer: LoraLayer, entries: dict[Tensor, dict[str, Tensor]]) -> None:
        """Add to a state what it must say of a layer; ``entries``: its entries by parameter."""
        b, delta = layer.lora_B, layer.delta
        anchors = [self.state[p]["anchor"] for p in (layer.lora_A, b)]
        if self.inplace:
            entries[b]["weight"] = layer.weight.detach()
        if delta is not None and not self.owns(delta, b) and not delta.changes_model():
            delta = None  # it is from before this model was sharded, and has not begun
        if "remainder" in entries[b]:
            low = None if delta is None or self.owns(delta, b) else delta.remainder
            low = entries[b]["remainder"] if low is None else low  # this run's, not another one's
            entries[b]["remainder"] = remainder_to_bytes(low, layer)
        if delta is None:  # from before any step; checkpoints load what the state names here
            begins = SavedUpdate(self.ratio, layer.scaling, self.inplace, [])
            entries[b] |= write_update(begins, *anchors)
            return
        lost = not delta.known() and not delta.in_weight and delta.started()
        if self.owns(delta, b):
            past = delta.past_updates if delta.known() else None
            saved = SavedUpdate(delta.update_ratio, delta.scaling, self.inplace, past)
        elif lost:
            return  # the run that loads it finds the same, and takes it over or refuses it
        else:  # another run's: this one would take it over in its next step
            past = delta.all_updates()
            saved = SavedUpdate(self.ratio, layer.scaling, self.inplace, past)
            for p in (layer.lora_A, b):
                # One for each, because torch.distributed loads checkpoints into these tensors.
                entries[p] |= {name: p.detach().clone() for name in ("anchor", "last")}
        entries[b] |= write_update(saved, *anchors)
