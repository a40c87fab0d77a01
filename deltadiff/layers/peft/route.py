"""`Route`: what `why_peft` found out about a layer, and a quick look whether it still holds.

`why_peft` asks PyTorch's modules dozens of questions, which takes the host as long as a small layer
itself. A route remembers which objects it asked about. While they are the same objects, and nothing
was hooked to them, the answers are the same, and only those about the input are asked again.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...checks import HALF_DTYPES
from ..linear import is_conv1d
from .rules import HOOKS, active_adapters, why_not_now, why_peft

if TYPE_CHECKING:
    from .fused_linear import FusedLinear


class Route:
    """A way through `lora_linear` for calls of a layer with these active adapters.

    Attributes:
        names: the active adapters that the layer has.
        matrix: W, (out_features, in_features).
        bias: of the base layer.
        factors: A, B and the dropout module of each adapter.
    """

    def __init__(self, layer: "FusedLinear"):
        base, self.names = layer.base_layer, active_adapters(layer)
        self.weight: Tensor = base.weight
        self.matrix = self.weight.T if is_conv1d(base) else self.weight
        self.bias: Tensor | None = base.bias
        self._active = layer._active_adapter
        if not isinstance(self._active, str):
            self._active = list(self._active)  # PEFT keeps its caller's list
        self.factors: list[tuple[Tensor, Tensor, nn.Module]] = []
        owners: list[tuple[dict[str, Any], str]] = [(layer._modules, "base_layer")]
        owners += (base._parameters, "weight"), (base._parameters, "bias")
        modules = [base]
        for name in self.names:
            parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            self.factors.append((parts[0].weight, parts[1].weight, parts[2]))
            owners += [(m._modules, name) for m in (layer.lora_A, layer.lora_B, layer.lora_dropout)]
            owners += [(m._parameters, "weight") for m in parts[:2]]
            modules += parts
        self._places = [(owner, key, owner[key]) for owner, key in owners]
        self._empty = [getattr(m, hooks) for m in modules for hooks in HOOKS]
        self._attributes = [m.__dict__ for m in modules]
        self._kinds = [(m, type(m)) for m in modules]
        self._dtypes = self.weight.dtype, self.factors[0][0].dtype

    def holds(self, layer: "FusedLinear", x: Tensor) -> bool:
        """Whether `why_peft` would still find no objection to this call."""
        own = layer.__dict__
        if own["_disable_adapters"] or own["merged_adapters"]:
            return False
        if own["_active_adapter"] != self._active:
            return False
        for owner, key, value in self._places:
            if owner.get(key) is not value:
                return False
        for hooks in self._empty:
            if hooks:
                return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        for module, kind in self._kinds:
            if module.__class__ is not kind:
                return False
        if why_not_now() is not None:
            return False
        w, given = self.weight, type(x)
        stored, adapter = self._dtypes
        a, b, _ = self.factors[0]
        if w.requires_grad or w.dtype is not stored:
            return False
        if a.dtype is not adapter or b.dtype is not adapter:
            return False
        if (given is not Tensor and given is not nn.Parameter) or x.device != w.device:
            return False
        # Where the input is cast, and where several adapters meet, the rules are asked again.
        if not own["cast_input_dtype_enabled"] or len(self.names) > 1:
            return False
        if torch.is_autocast_enabled(w.device.type):
            compute = torch.get_autocast_dtype(w.device.type)
            return compute in HALF_DTYPES and adapter is torch.float32 and x.dtype.itemsize <= 4
        return x.dtype is stored


def find_route(layer: "FusedLinear", x: Tensor) -> Route | None:
    """The way of this call through `lora_linear`; None where PEFT's own forward pass runs it."""
    if torch.compiler.is_compiling():  # it runs no host code later, and could not follow `_route`
        return Route(layer) if why_peft(layer, x) is None else None
    route = layer._route
    if route is not None and route.holds(layer, x):
        return route
    layer._route = Route(layer) if why_peft(layer, x) is None else None
    return layer._route
