"""`lora_layers`: the low-rank pairs of a swapped model, each seen alike whoever owns its layer.

A `LoraLinear` is its own view. PEFT's layers stay PEFT's, so `peft.PeftPair` shows one adapter of
such a layer. Optimizers, reports and files know nothing but the attributes of `LoraLayer`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..errors import SwapError
from ..ops.reference_blocks import LowRankLinear
from .pending_delta import PendingDelta

if TYPE_CHECKING:
    from ..ops.dispatch import Dispatch

# A mapping, a key and the value that must stand there: see `LoraLayer.places`.
Place = tuple[Mapping[str, Any], str, object]


class LoraLayer(Protocol):
    """A linear layer with one low-rank pair: y = x (W + s B g A)^T + bias.

    Attributes:
        weight, matrix: W as it is stored, and as (out_features, in_features).
        lora_A, lora_B: (r, in_features) and (out_features, r).
        r, lora_alpha, scaling: rank; the number that the scaling s is made of; s.
        lora_dropout: probability that the branch does not see an element of x, in training.
        gate: what stands between the factors, see `gate.py`; None means 1.
        share_group: the name of the group of layers that hold this pair; None for its own pair.
        delta: what Delta-LoRA has added so far; None for plain LoRA.
        adapter: the parameters of the branch.
        holder: the module whose parameter W is.
        active: whether the forward pass uses the pair.
        in_peft: whether the layer is PEFT's.
        dispatch: which backend, and which kernels of it, run the layer in training, and why.
        swapped_in: False once the layer was taken out of the model, or the pair out of the layer.
    """

    delta: PendingDelta | None

    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...
    @property
    def r(self) -> int: ...
    @property
    def lora_alpha(self) -> float: ...
    @property
    def gate(self) -> Tensor | None: ...
    @property
    def share_group(self) -> str | None: ...
    @property
    def active(self) -> bool: ...
    @property
    def in_peft(self) -> bool: ...
    @property
    def swapped_in(self) -> bool: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def matrix(self) -> Tensor: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def lora_A(self) -> nn.Parameter: ...
    @property
    def lora_B(self) -> nn.Parameter: ...
    @property
    def scaling(self) -> float: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def adapter(self) -> list[nn.Parameter]: ...
    @property
    def holder(self) -> nn.Module: ...
    @property
    def dispatch(self) -> "Dispatch": ...

    def places(self) -> list[Place]:
        """What must still stand where it stands now for prepared launches to be right."""
        ...

    def why_no_update(self) -> str | None:
        """None where Delta-LoRA may update W of this layer, else the reason in words."""
        ...


class HoldsPairs:
    """A module in a model whose forward pass is `lora_linear`."""

    backend: str | None
    in_features: int

    def as_lora_linear(self, x: Tensor) -> LowRankLinear | None:
        """What its forward pass multiplies x by; None where that is no `lora_linear` without more.

        With dropout, or an input or weight that only the layer's own forward pass can take, it is
        None. Parameters must be whole tensors when this is called.
        """
        raise NotImplementedError

    def pairs(self) -> dict[str, LoraLayer]:
        """Its pairs; the key is added to the name of the module, and empty where it has one."""
        raise NotImplementedError

    def check_state(self, state: dict[str, Any], prefix: str) -> None:
        """Raise where a state holds an update that this module could not load."""
        raise NotImplementedError


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The pairs of a model by the name of their layer; empty for a model that is not swapped.

    Where PEFT's layer has several adapters, the name of each follows in brackets.
    """
    return {
        f"{name}{suffix}": pair
        for name, m in model.named_modules()
        if isinstance(m, HoldsPairs)
        for suffix, pair in m.pairs().items()
    }


def swapped_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """`lora_layers` of a model that has some; SwapError for a model that is not swapped."""
    layers = lora_layers(model)
    if not layers:
        raise SwapError("model", "a model without swapped layers", "a model that `swap_` changed")
    return layers
