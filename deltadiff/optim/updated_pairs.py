"""`UpdatedPairs`: which layers a run of Delta-LoRA updates, and what it keeps of their pairs.

Under DeepSpeed's ZeRO the param groups hold vectors in the place of the pairs, see `zero_vectors`.
What the update keeps of a pair is then no part of the state of a parameter.
"""

from collections import defaultdict
from collections.abc import Collection
from typing import Any
from weakref import WeakMethod

from torch import Tensor

from ..checks import HALF_DTYPES
from ..layers.lora_layers import LoraLayer
from ..layers.writable import check_writable
from .fused_adamw import FusedAdamW
from .param_groups import find_pairs, group_indices, layer_names
from .update_state import allocate_factor, allocate_remainder
from .weight_launches import check_rounding
from .zero_vectors import WatchedGroup, check_update, check_vectors, give_updates, holds_vectors


class UpdatedPairs(FusedAdamW):
    """The part of `DeltaLoRA` that finds its layers and keeps the anchors of their pairs."""

    w_update: str | None
    rounding: str | None

    _copied = (
        *FusedAdamW._copied, "w_update", "rounding", "_delta", "_sent", "_pairs", "_own_params",
        "_vectors", "_of_vectors",
    )  # fmt: skip

    def __init__(self, *args: Any, **options: Any):
        self._delta: dict[Tensor, Tensor] = {}  # A' - A and B' - B of the current step
        self._sent: dict[Tensor, float] = {}  # lambda of the last step, while a state is loaded
        self._pairs: dict[str, LoraLayer] = {}
        self._own_params: list[list[Tensor]] = []  # of each group, before there were vectors
        self._vectors = False  # whether the groups hold vectors of DeepSpeed's ZeRO by now
        self._of_vectors: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # then, see `_factors`
        super().__init__(*args, **options)

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

    def _allocate_update(self, layer: LoraLayer) -> None:
        inplace = self.w_update == "inplace"
        for p in (layer.lora_A, layer.lora_B):
            allocate_factor(p, self._factors[p], self._delta if inplace else None)
        allocate_remainder(layer, self._factors[layer.lora_B], self._keeps_remainder(layer))

    def _keeps_remainder(self, layer: LoraLayer) -> bool:
        keeps = self.rounding in (None, "remainder") and self.w_update == "inplace"
        return keeps and layer.weight.dtype in HALF_DTYPES
