"""`Route`: what `why_peft` found out about a layer, and a quick look whether it still holds.

`why_peft` asks PyTorch's modules dozens of questions, which takes the host as long as a small layer
itself. A route remembers which objects it asked about. While they are the same objects, and nothing
was hooked to them, the answers are the same, and only those about the input are asked again.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...checks import HALF_DTYPES
from ...kernels.runtime.dtypes import DTYPES as KERNEL_DTYPES
from ...ops.quantised import Quantised
from ...ranks import is_unit
from ..base_format import quantised_format
from ..hooks import HOOKS
from ..linear import is_conv1d
from .rules import active_adapters, why_not_now, why_peft
from .units import dtype_in_passes

if TYPE_CHECKING:
    from .fused_linear import Fused


class Route:
    """A way through `lora_linear` for calls of a layer with these active adapters.

    Attributes:
        names: the active adapters that the layer has.
        weight, matrix, bias: of the base layer; the matrix is W, (out_features, in_features), which
            `lora_linear` also takes in few bits.
        format: how it decodes those; None for a dense W.
        factors: A, B and the dropout module of each adapter.
        units: the modules that FSDP shards one by one. Their parameters are whole while they are
            called, see `run_inside`; outside of that, other tensors stand in their places.
    """

    def __init__(self, layer: "Fused"):
        base, self.names = layer.base_layer, active_adapters(layer)
        self._base: Any = base
        self.format = quantised_format(base)
        self._transposed = is_conv1d(base)
        self._active = layer._active_adapter
        if not isinstance(self._active, str):
            self._active = list(self._active)  # PEFT keeps its caller's list
        self._parts: list[tuple[Any, Any, nn.Module]] = []
        owners: list[tuple[dict[str, Any], str]] = [(layer._modules, "base_layer")]
        modules = [base]
        for name in self.names:
            parts = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
            self._parts.append(parts)
            owners += [(m._modules, name) for m in (layer.lora_A, layer.lora_B, layer.lora_dropout)]
            modules += parts
        self.units: list[nn.Module] = [m for m in modules if is_unit(m)]
        owners += [
            (m._parameters, key) for m in modules if m not in self.units for key in m._parameters
        ]
        self._places = [(owner, key, owner[key]) for owner, key in owners]
        called = modules if self.format is None else modules[1:]  # `weight_of` asks such a base
        self._hooks = [
            (found, len(found)) for m in called for found in (getattr(m, h) for h in HOOKS)
        ]
        self._attributes = [m.__dict__ for m in called]
        self._kinds = [(m, type(m)) for m in modules]
        tensors = [held for *_, held in self._places if isinstance(held, Tensor)]
        self._stored = [(t, t.dtype) for t in tensors]
        self._dtypes = dtype_in_passes(base), dtype_in_passes(modules[1])
        self.read()

    def read(self) -> None:
        """Read the parameters anew, which stand in their places while the units run."""
        self.weight: Tensor = self._base.weight
        self.matrix: Tensor | Quantised = self.weight.T if self._transposed else self.weight
        if self.format is not None:
            matrix = self.format.weight_of(self._base)
            assert not isinstance(matrix, str)  # `why_peft` has asked
            self.matrix = matrix
        self.bias: Tensor | None = self._base.bias
        self.factors: list[tuple[Tensor, Tensor, nn.Module]] = [
            (a.weight, b.weight, dropout) for a, b, dropout in self._parts
        ]

    def holds(self, layer: "Fused", x: Tensor) -> bool:
        """Whether `why_peft` would still find no objection to this call."""
        own = layer.__dict__
        if own["_disable_adapters"] or own["merged_adapters"]:
            return False
        if own["_active_adapter"] != self._active:
            return False
        for owner, key, value in self._places:
            if owner.get(key) is not value:
                return False
        for hooks, count in self._hooks:
            if len(hooks) != count:
                return False
        for attributes in self._attributes:
            if "forward" in attributes:
                return False
        for module, kind in self._kinds:
            if module.__class__ is not kind:
                return False
        if why_not_now() is not None:
            return False
        if self.format is not None:  # what is beside the bytes may have been moved or made anew
            matrix = self.format.weight_of(self._base)
            if isinstance(matrix, str):
                return False
            self.matrix = matrix
        w, given = self.weight, type(x)
        stored, adapter = self._dtypes
        if w.requires_grad:
            return False
        for tensor, dtype in self._stored:
            if tensor.dtype is not dtype:
                return False
        if (given is not Tensor and given is not nn.Parameter) or x.device != w.device:
            return False
        # Where the input is cast, and where several adapters meet, the rules are asked again.
        if not own["cast_input_dtype_enabled"] or len(self.names) > 1:
            return False
        if self.format is not None:
            accepted = torch.float32, self.format.compute_dtype(self._base, x)
            return x.dtype in KERNEL_DTYPES and adapter in accepted
        if torch.is_autocast_enabled(w.device.type):
            compute = torch.get_autocast_dtype(w.device.type)
            return compute in HALF_DTYPES and adapter is torch.float32 and x.dtype.itemsize <= 4
        return x.dtype is stored


def find_route(layer: "Fused", x: Tensor) -> Route | None:
    """The way of this call through `lora_linear`; None where PEFT's own forward pass runs it."""
    if torch.compiler.is_compiling():  # it runs no host code later, and could not follow `_route`
        return Route(layer) if why_peft(layer, x) is None else None
    route = layer._route
    if route is not None and route.holds(layer, x):
        return route
    layer._route = Route(layer) if why_peft(layer, x) is None else None
    return layer._route
