"""The weight updates of one launch: W += lambda s (B'A' - BA) for layers of one kind.

A `WeightUpdate` holds the layers of one param group, device and weight dtype. It knows when their
updates start, gives each its `PendingDelta`, and takes over what an earlier run, a file or an
earlier lambda left in them.
"""

import warnings

import torch
from torch import Tensor

from ..checks import DTYPES, HALF_DTYPES
from ..errors import ArgumentError, SwapError
from ..layers.lora_linear import LoraLinear
from ..layers.pending_delta import LowRankFactors, PendingDelta
from ..ops.delta_update import delta_update_, prepare_delta_update
from ..ops.dispatch import choose_path

MOST_FOLDED = 8  # products of earlier update ratios that are kept, for saving


Products = list[LowRankFactors] | None


class WeightUpdate:
    """One launch of the Delta-LoRA update.

    Args:
        group: the param group; its "update_ratio" may change between steps.
        layers: name to layer, weights of one device and dtype.
        inplace: write W, or let the forward pass add the update.
        rounding: of a 16-bit W.
        seed: of the random bits of "stochastic".
        state: the optimizer's; holds "anchor" and "remainder".
        delta: A' - A and B' - B of the current step, by parameter.
    """

    def __init__(self, group, layers: dict[str, LoraLinear], inplace, rounding, seed, state, delta):
        w = next(iter(layers.values())).weight
        self.group, self.layers, self.inplace, self.seed = group, layers, inplace, seed
        self.state, self.delta, self.device = state, delta, w.device
        self.rounding = rounding if w.dtype in HALF_DTYPES else "none"
        self.start_step, self.ratio = group["start_step"], group["update_ratio"]
        self.backend = choose_path(
            w.device, w.dtype if w.dtype in DTYPES else torch.float32
        ).backend
        self.gates: dict[int, Tensor] = {}  # rank -> the gate that its layers share
        self.opened: dict[int, Tensor] = {}  # what the gates become
        self.apply: Tensor | None = None  # on the device: t > K
        self._launches: list = []
        self._launched = False
        self._lost: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._warned = False

    def check_settings(self) -> None:
        """Raise where the group's values cannot be followed."""
        if self.group["start_step"] != self.start_step:
            given = f"{self.group['start_step']} after {self.start_step}"
            raise ArgumentError("start_step", given, "one value for the whole run")
        if not self.inplace and self.ratio != self.group["update_ratio"]:
            folded = max(len(m.delta.past_updates) for m in self.layers.values() if m.delta)
            if folded >= MOST_FOLDED:
                given = f"{self.group['update_ratio']}, change number {MOST_FOLDED + 1}"
                accepted = f"at most {MOST_FOLDED} changes while w_update is 'factored'"
                raise ArgumentError("update_ratio", given, accepted)

    def check_layers(self) -> bool:
        """Whether every layer has the weight that it had at the last `prepare`.

        Raises SwapError where a layer was un-swapped or merged.
        """
        changed = [
            attributes
            for attributes, params, weight in self._known
            if params["weight"] is not weight or not attributes["swapped_in"]
        ]
        if not changed:
            return True
        for name, layer in self.layers.items():
            if not layer.swapped_in:
                raise SwapError(name, "a layer that was un-swapped or merged", "a swapped layer")
        return False

    def prepare(self) -> None:
        """Gather the tensors of the launches: one for each dtype of adapters, so usually one."""
        # Looked at in every step: asking the modules themselves takes ten times as long.
        self._known = [
            (vars(m), m._parameters if "weight" in m._parameters else vars(m), m.weight)
            for m in self.layers.values()
        ]
        self._launches = []
        if not self.inplace:
            return
        for dtype in dict.fromkeys(m.lora_A.dtype for m in self.layers.values()):
            layers = [m for m in self.layers.values() if m.lora_A.dtype == dtype]
            low = []
            if self.rounding == "remainder":
                low = [self.state[m.lora_B]["remainder"] for m in layers]
            lists = self._lists(layers)
            launch = prepare_delta_update(self.backend, *lists, self.rounding, low, self.seed)
            self._launches.append((launch, layers))

    def _lists(self, layers: list[LoraLinear]) -> list[list]:
        return [
            [m.matrix for m in layers],
            [m.lora_A for m in layers],
            [m.lora_B for m in layers],
            [self.delta[m.lora_A] for m in layers],
            [self.delta[m.lora_B] for m in layers],
            [self.ratio * m.scaling for m in layers],
        ]

    def run(
        self, t: Tensor, t_least: int, t_most: float, found_inf: Tensor | None, capturing: bool
    ) -> bool:
        """Update the weights in iteration ``t`` (on the device; the host knows bounds of it).

        Returns whether they may have been written.
        """
        if not self.inplace or (not self.ratio and not capturing):
            return False
        compiled = self._launched or self.device.type == "cpu"
        surely_early = t_most <= self.start_step and not capturing  # replays come later
        if surely_early and compiled:  # once in vain, or a capture would compile
            return False
        known = t_least > self.start_step and not capturing and self.backend != "triton"
        apply = None if known else self.apply  # one kind of launch on the GPU, so one compilation
        if found_inf is not None:
            apply = self.apply * (found_inf.view(()) == 0)
        if self.rounding == "nearest" and not self._warned and not capturing:
            if t_most > self.start_step:
                self._measure_loss()
        for launch, _ in self._launches:
            launch(t, apply)
        self._launched = True
        return True

    # ------------------------------------------------- what earlier steps left in W

    def bind(self, started: bool, restored: dict[Tensor, Products] | None = None) -> None:
        """Give each layer its PendingDelta.

        ``started``: whether W was updated before. ``restored``: by lora_B, the products of a
        state that was loaded; None at the start of a run, which takes over what it finds.
        """
        for r in {layer.r for layer in self.layers.values()}:
            gate = self.gates[r]
            gate.copy_(PendingDelta.make_gate(self.ratio, r, gate, started))
            self.opened[r].copy_(PendingDelta.make_gate(self.ratio, r, gate, True))
        for layer in self.layers.values():
            a, b, before = layer.lora_A, layer.lora_B, layer.delta
            anchor_A, anchor_B = self.state[a]["anchor"], self.state[b]["anchor"]
            own = before is not None and before.anchor_B is anchor_B
            if started and not own and restored is None:  # joins a run past its first update
                anchor_A.copy_(a)
                anchor_B.copy_(b)
            layer.delta = PendingDelta(
                anchor_A, anchor_B, self.ratio, self.gates[layer.r],
                in_weight=self.inplace, remainder=self.state[b].get("remainder"),
            )  # fmt: skip
            if before is not None and not own:
                self._take_over(layer, before, restored is not None)
            elif restored is not None:
                layer.delta.past_updates = restored[b]
            elif own:
                layer.delta.past_updates = before.past_updates

    def _take_over(self, layer: LoraLinear, before: PendingDelta, restored: bool) -> None:
        """Keep what ``before`` says is part of the model; W gets what it may hold."""
        delta = layer.delta
        if before.remainder is not None and delta.remainder is not None and not restored:
            delta.remainder.copy_(before.remainder)
        products = None if before.past_updates is None else list(before.past_updates)
        writes = [p for p in products or () if not p.in_weight]
        if before.started():
            pending = before.product(layer.lora_A, layer.lora_B, layer.scaling)
            if not pending.in_weight and (delta.in_weight or not restored):
                writes.append(pending)
            if not restored and products is not None:
                products.append(pending)
        if delta.in_weight:
            for p in writes:
                delta_update_(
                    layer.matrix, p.A, p.B, torch.zeros_like(p.A), p.B, scale=1.0,
                    rounding=self.rounding, remainder=delta.remainder, seed=self.seed,
                )  # fmt: skip
                p.in_weight = True
        delta.past_updates = products

    def change_ratio(self, t: int) -> None:
        """lambda changed: what the old one did stays as a finished product, and anchors move up."""
        ratio, started = self.group["update_ratio"], t > self.start_step + 1
        for layer in self.layers.values():
            delta = layer.delta
            if started:
                if delta.update_ratio and delta.past_updates is not None:
                    delta.past_updates.append(
                        delta.product(layer.lora_A, layer.lora_B, layer.scaling)
                    )
                    if len(delta.past_updates) > MOST_FOLDED:
                        delta.past_updates = None  # too many to save; W itself has them
                delta.anchor_A.copy_(layer.lora_A)
                delta.anchor_B.copy_(layer.lora_B)
            delta.update_ratio = ratio
        for r, gate in self.gates.items():
            self.opened[r].copy_(PendingDelta.make_gate(ratio, r, gate, True))
            gate.copy_(PendingDelta.make_gate(ratio, r, gate, started))
        self.set_ratio(ratio)

    def set_ratio(self, ratio: float) -> None:
        self.ratio = ratio
        for launch, layers in self._launches:
            launch.rescale([ratio * m.scaling for m in layers])

    # -------------------------------------------------------- loss under "nearest"

    def _measure_loss(self) -> None:
        if self._lost is None:
            factors = zip(*self._lists(list(self.layers.values())), strict=True)
            sums = sum(update_share(*tensors[:5], scale=tensors[5]) for tensors in factors)
            event = None
            if sums.is_cuda:
                sums = torch.empty(2, pin_memory=True).copy_(sums, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
            self._lost = sums, event
        self.report_loss()

    def report_loss(self) -> None:
        """Warn of what round-to-nearest loses, once the figures are there; never wait for them."""
        if self._lost is None or (self._lost[1] is not None and not self._lost[1].query()):
            return
        got, wanted = self._lost[0].tolist()
        self._lost = None
        if wanted:
            self._warned = True
            warnings.warn(
                f'rounding="nearest" lost {1 - got / wanted:.1%} of the first weight update; '
                '"remainder" loses none, "stochastic" none on average',
                stacklevel=4,
            )


def update_share(weight, lora_A, lora_B, delta_A, delta_B, *, scale: float) -> Tensor:
    """(<got, wanted>, |wanted|^2) of the next update under round-to-nearest, float32 on the device.

    Their ratio is the share of the wanted update that reaches W. Runs in blocks of rows, so that no
    temporary of the size of W is made.
    """
    sums = torch.zeros(2, dtype=torch.float32, device=weight.device)
    a, da = lora_A.detach().float(), delta_A.float()
    rows = max(1, 2**20 // weight.shape[1])
    blocks = zip(*(t.detach().split(rows) for t in (weight, lora_B, delta_B)), strict=True)
    for w, b, db in blocks:
        wanted = scale * (db.float() @ a + (b.float() - db.float()) @ da)
        got = (w.float() + wanted).to(w.dtype).float() - w.float()
        sums += torch.stack([(got * wanted).sum(), (wanted * wanted).sum()])
    return sums
