"""`Fused`: a layer of PEFT with `lora_linear` as its forward pass; `FusedLinear`: PEFT's Linear."""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from ...errors import SwapError
from ...ops.decode_fp8 import DATA_DTYPES
from ...ops.quantised import is_quantised
from ...ops.reference_blocks import LowRankLinear
from ...ranks import is_partitioned
from ..delta_state import (
    check_loadable,
    check_saved_delta,
    delta_to_state,
    follow_module,
    follow_weight,
    load_delta,
    take_saved_delta,
)
from ..fused_branch import fused_branch
from ..lora_layers import HoldsPairs, LoraLayer
from ..pending_delta import PendingDelta
from .pair import PeftPair
from .route import Route, find_route
from .rules import active_adapters
from .units import run_inside
from .update_guards import check_kept, warn_dropped, warn_saved


class Deltas(dict[str, PendingDelta]):
    """Updates by adapter, which are attributes too: see `delta_to_state` for the reason."""

    def __getattr__(self, name: str) -> PendingDelta:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Fused(HoldsPairs, lora.LoraLayer):
    """PEFT's layer; `fuse.fuse_` makes it of one by changing its class.

    Attributes:
        peft_class: the class that it had.
        deltas: what Delta-LoRA has added so far, by adapter.
        backend: as for `swap_`.
        keeps_active: whether an adapter that is being added stays inactive.
        _route: the way of the last call that was fast, see `Route`.
        unmerged: W as it was before PEFT merged adapters into it; only while they are merged, and
            only where Delta-LoRA updates W in place.
    """

    peft_class: type
    deltas: Deltas
    backend: str | None
    unmerged: Tensor
    keeps_active = False
    _route: Route | None = None

    def _get_name(self) -> str:
        """PEFT's name, which `print` shows and PEFT's ``get_layer_status`` reports."""
        return self.peft_class.__name__

    def pairs(self) -> dict[str, LoraLayer]:
        pairs = {name: PeftPair(self, name) for name in self.lora_A}
        return {f"[{name}]" if len(pairs) > 1 else "": pair for name, pair in pairs.items()}

    # ------------------------------------------------------------------ forward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        route = None if args or kwargs else find_route(self, x)
        if route is None:
            return self._peft_forward(x, *args, **kwargs)
        return run_inside(route.units, x, partial(self._fused_forward, route))

    def _fused_forward(self, route: Route, x: Tensor) -> Tensor:
        if route.units:
            route.read()
        weight, product = route.matrix, self._product(route)
        if is_quantised(weight) and route.format is not None:
            return route.format.branch(x, self.base_layer, weight, *product, self.backend)
        return fused_branch(x, weight, route.bias, *product, self.backend)

    def as_lora_linear(self, x: Tensor) -> LowRankLinear | None:
        route = find_route(self, x)
        if route is None or route.units:
            return None
        if route.format is not None and route.format.changes_dtype(self.base_layer, x):
            return None
        a, b, scaling, gate, dropout = self._product(route)
        return None if dropout else LowRankLinear(route.matrix, a, b, gate, route.bias, scaling)

    def _product(self, route: Route) -> tuple[Tensor, Tensor, float, Tensor | None, float]:
        """(A, B, scaling, gate, dropout) of the one low-rank product of the active adapters."""
        stacked = []
        for name, (a, b, drop) in zip(route.names, route.factors, strict=True):
            dropout = getattr(drop, "p", 0.0) if drop.training else 0.0
            s, delta, gate = self.scaling[name], self.deltas.get(name), None
            if delta is not None and not delta.in_weight:
                if dropout:
                    given = f"{dropout} on a layer whose branch holds a Delta-LoRA update"
                    accepted = "0, or the adapter that `export_peft` writes"
                    raise SwapError("lora_dropout", given, accepted)
                a, b, gate, s = delta.stack(a, b, s)
            if len(route.names) == 1:
                if isinstance(s, Tensor):  # made one for hot-swapping without a new compilation
                    return a, b, 1.0, s if gate is None else gate * s, dropout
                return a, b, float(s), gate, dropout
            factor = s if gate is None else gate * s
            stacked.append((a, b * (factor.to(b.dtype) if isinstance(factor, Tensor) else factor)))
        a, b = torch.cat([a for a, _ in stacked]), torch.cat([b for _, b in stacked], dim=1)
        return a, b, 1.0, None, 0.0  # `why_peft`: several active adapters have no dropout

    def _peft_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward pass, and beside it what Delta-LoRA adds to W without writing it."""
        names = [n for n in active_adapters(self) if n in self.deltas]
        names = [n for n in names if not self.deltas[n].in_weight]
        if names and kwargs.get("adapter_names") is not None:
            given = "adapters by sample, beside an update of Delta-LoRA"
            raise SwapError("adapter_names", given, "adapters that `export_peft` wrote")
        y = super().forward(x, *args, **kwargs)
        if self.disable_adapters or self.merged:  # PEFT's merging wrote the update into W
            return y
        for name in names:
            for p in self.deltas[name].added():
                s = nn.functional.linear(x, p.A.to(x.dtype))
                y = y + nn.functional.linear(s, p.B.to(x.dtype)).to(y.dtype)
        return y

    # ------------------------------------------- PEFT's calls on a layer with an update of W

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's, which is what merging adds to W, with the update that is not in W yet."""
        found, delta = super().get_delta_weight(adapter), self.deltas.get(adapter)
        if delta is None:
            return found
        for p in delta.unwritten():
            product = p.B @ p.A
            found = found + (product.T if self.fan_in_fan_out else product).to(found.dtype)
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.check_mergeable(active_adapters(self) if adapter_names is None else adapter_names)
        before = None
        if not self.merged and any(delta.in_weight for delta in self.deltas.values()):
            before = self.get_base_layer().weight.detach().clone()
        super().merge(safe_merge, adapter_names)
        if before is not None and self.merged:
            self.unmerged = before

    def check_mergeable(self, adapter_names: Collection[str]) -> None:
        """Raise SwapError where W cannot hold the adapters of these names that the layer has."""
        weight, held = self.get_base_layer().weight, set(adapter_names) & self.lora_A.keys()
        if held and weight.dtype in DATA_DTYPES:
            given = "a weight in FP8, to which PEFT cannot add"
            accepted = "`deltadiff.export_peft`, and the base in 16 bits to merge into"
            raise SwapError("merge", given, accepted)

    def unmerge(self) -> None:
        """PEFT's; a W that Delta-LoRA writes gets its very bits back, which PEFT would round."""
        super().unmerge()
        if "unmerged" in vars(self):
            self.get_base_layer().weight.data.copy_(self.unmerged)
            del self.unmerged

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which adds an adapter; all but PEFT's own model then make it the active one."""
        if not self.keeps_active:
            check_kept("add_adapter", self.changed_weight(), ())
        super().update_layer(adapter_name, *args, **kwargs)

    def changed_weight(self) -> list[str]:
        """The adapters whose update lies in W; reads from the device."""
        return [n for n, delta in self.deltas.items() if delta.in_weight and delta.changes_model()]

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            check_kept("disable_adapter", self.changed_weight(), ())
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        check_kept("set_adapter", self.changed_weight(), names)
        super().set_adapter(adapter_names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        check_kept("delete_adapter", self.changed_weight(), self.deltas.keys() - {adapter_name})
        super().delete_adapter(adapter_name)
        self.deltas.pop(adapter_name, None)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT's ``unload`` and ``merge_and_unload`` put in the place of the layer."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            check_kept("unload", self.changed_weight(), ())
        return self.get_base_layer()

    # ---------------------------------------------------------- moves, and the layer's state

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_route": None}  # a copy has other parameters

    def _apply(self, fn: Any, recurse: bool = True) -> "Fused":
        before = {name: PeftPair(self, name).matrix.detach() for name in self.deltas}
        super()._apply(fn, recurse)
        for name, delta in self.deltas.items():
            follow_weight(delta, before[name], PeftPair(self, name).matrix)
            follow_module(delta, self.lora_A[name].weight, self.lora_B[name].weight)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, delta in self.deltas.items():
            # PEFT puts what has "lora_" in its name into its files.
            pair = self.lora_A[name].weight, self.lora_B[name].weight
            destination |= delta_to_state(delta, f"{prefix}deltas.{name}.", *pair)
        warn_saved(self.deltas)

    def _places(self, prefix: str) -> dict[str, list[str]]:
        """The keys of each adapter's pair in a state."""
        return {n: [f"{prefix}lora_{x}.{n}.weight" for x in "AB"] for n in self.lora_A}

    def check_state(self, state: dict[str, Any], prefix: str) -> None:
        for name, factors in self._places(prefix).items():
            own, pair = PeftPair(self, name), map(state.get, factors)
            check_saved_delta(state, f"{prefix}deltas.{name}.", own, *pair)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        pairs = self._places(prefix)
        saved: dict[str, PendingDelta | None] = {}
        for name, factors in pairs.items():
            own, pair = PeftPair(self, name), map(state_dict.get, factors)
            saved[name] = take_saved_delta(state_dict, f"{prefix}deltas.{name}.", own, *pair)
        for name in self.lora_A:
            check_loadable(self.deltas.get(name), saved[name])
        super()._load_from_state_dict(state_dict, prefix, *rest)
        for name in self.lora_A:
            if not all(factor in state_dict for factor in pairs[name]):
                continue  # a part of a state, which says nothing of this adapter
            a, b = (state_dict[factor] for factor in pairs[name])
            lost = self.deltas.get(name) if saved[name] is None else None
            if is_partitioned(self.lora_A[name].weight):
                lost = None  # the state has no values of the pair either, see `load_delta`
            if lost is not None and lost.differs(a, b) and lost.changes_model():
                warn_dropped(name, lost.in_weight)
                if lost.in_weight and f"{prefix}base_layer.weight" not in state_dict:
                    lost.end_update(a, b)  # W cannot be taken back
                    continue
            load_delta(PeftPair(self, name), saved[name], a, b)


class FusedLinear(Fused, lora.Linear):
    """``lora.Linear``, on an ``nn.Linear`` or a `Conv1D`."""

    peft_class = lora.Linear


class FusedTorchaoLinear(Fused, TorchaoLoraLinear):
    """PEFT's layer on a weight of torchao; what `lora_linear` does not decode runs PEFT's way."""

    peft_class = TorchaoLoraLinear
