"""`PeftPair`: one adapter of a layer of PEFT as a `LoraLayer`, read anew at each access."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...ops.dispatch import Dispatch
from ...ranks import whole_shape
from ..base_format import base_format
from ..linear import is_conv1d, linear_shape
from ..lora_layers import HoldsPairs, Place
from ..pending_delta import PendingDelta
from .rules import active_adapters, kind_of, why_peft

if TYPE_CHECKING:
    from ..linear import LinearLayer
    from .fused_linear import Fused


class PeftPair:
    """The view of adapter ``name`` of ``layer``; equal to every other view of the same adapter."""

    gate: Tensor | None = None
    share_group: str | None = None
    in_peft = True

    def __init__(self, layer: "Fused", name: str):
        self.layer, self.name = layer, name

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PeftPair):
            return NotImplemented
        return other.layer is self.layer and other.name == self.name

    def __hash__(self) -> int:
        return hash((self.layer, self.name))

    @property
    def holder(self) -> "LinearLayer":
        return self.layer.get_base_layer()

    @property
    def weight(self) -> Tensor:
        return self.holder.weight

    @property
    def transposed(self) -> bool:
        return is_conv1d(self.holder)

    @property
    def matrix(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight

    @property
    def out_features(self) -> int:
        return linear_shape(self.layer)[0]

    @property
    def in_features(self) -> int:
        return linear_shape(self.layer)[1]

    @property
    def lora_A(self) -> nn.Parameter:
        return self.layer.lora_A[self.name].weight

    @property
    def lora_B(self) -> nn.Parameter:
        return self.layer.lora_B[self.name].weight

    @property
    def adapter(self) -> list[nn.Parameter]:
        factors = self.layer.lora_A[self.name], self.layer.lora_B[self.name]
        return [p for factor in factors for p in factor.parameters()]

    @property
    def r(self) -> int:
        return whole_shape(self.lora_A)[0]

    @property
    def lora_alpha(self) -> float:
        return self.layer.lora_alpha[self.name]

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.name])  # hot-swapping may have made it a tensor

    @property
    def lora_dropout(self) -> float:
        return getattr(self.layer.lora_dropout[self.name], "p", 0.0)

    @property
    def delta(self) -> PendingDelta | None:
        return self.layer.deltas.get(self.name)

    @delta.setter
    def delta(self, delta: PendingDelta | None) -> None:
        if delta is None:
            self.layer.deltas.pop(self.name, None)
        else:
            self.layer.deltas[self.name] = delta

    @property
    def active(self) -> bool:
        return self.name in active_adapters(self.layer)

    @property
    def dispatch(self) -> Dispatch:
        reason = why_peft(self.layer)
        if reason is not None:
            return Dispatch("peft", f"PEFT's own forward: {reason}")
        delta, path = self.delta, base_format(self.holder).path
        r = self.r if delta is None or delta.in_weight else delta.rank
        return path(self.holder, r, self.lora_dropout, self.layer.backend)

    @property
    def swapped_in(self) -> bool:
        return isinstance(self.layer, HoldsPairs) and self.name in self.layer.lora_A

    def places(self) -> list[Place]:
        layer, name = self.layer, self.name
        return [
            (self.holder._parameters, "weight", self.weight),
            (layer.lora_A._modules, name, layer.lora_A[name]),
            (vars(layer), "deltas", layer.deltas),
        ]

    def why_no_update(self) -> str | None:
        if self.name in self.layer.lora_variant:
            return f"a variant of LoRA: {type(self.layer.lora_variant[self.name]).__name__}"
        if self.lora_dropout:
            return f"lora_dropout={self.lora_dropout:g}, which Delta-LoRA forbids"
        if self.layer.base_layer is not self.holder:
            return f"another tuner's layer inside of it: {kind_of(self.layer.base_layer)}"
        return None
