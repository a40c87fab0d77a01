"""`LoraLinear`: a linear layer with a low-rank branch, the layer that `swap_` puts in."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import SwapError
from ..ops.dispatch import Dispatch
from ..ops.reference_blocks import LowRankLinear
from ..ranks import is_sharded
from .base_format import base_format
from .delta_state import (
    check_loadable,
    check_saved_delta,
    delta_to_state,
    follow_loading,
    follow_module,
    follow_weight,
    load_delta,
    take_saved_delta,
)
from .fp8 import scales_of
from .gate import fold_core, is_core
from .layer_state import PAIR, LayerState
from .linear import is_conv1d, linear_shape
from .lora_layers import HoldsPairs, LoraLayer, Place, swapped_layers
from .pending_delta import PendingDelta

if TYPE_CHECKING:
    from .linear import LinearLayer


class LoraLinear(HoldsPairs, LayerState):
    """Linear layer with a low-rank branch: y = x (W + s B g A)^T + bias.

    `deltadiff.swap_` makes it. It shares ``weight`` and ``bias`` with the layer that it replaces.
    DiffoRA's equation 10 is this formula with one gate g; without a gate it is LoRA.

    In training mode the branch sees x after dropout. Each forward pass draws the seed of its mask
    from PyTorch's generator of the device, so the masks follow `torch.manual_seed`. CUDA graphs and
    compiled models get a new mask in each pass. Activation checkpointing restores the generator's
    state (``preserve_rng_state``), so the pass that it repeats gets the same mask.

    Attributes:
        weight: stored as the replaced layer stores it, which is (in, out) for a `Conv1D`.
        matrix: W, always (out_features, in_features).
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        r, lora_alpha: rank, and the number that ``scaling`` is made of.
        scaling: s, lora_alpha / r; with rsLoRA, lora_alpha / sqrt(r).
        lora_dropout: probability that the branch does not see an element of x, in training mode.
        gate: g, a tensor of one entry or r entries on the device, or FLoRA's core, r x r (see
            `gate.py`); a parameter where it is trained. None means 1.
        training_gate: a gate that takes the place of ``gate`` in training mode, as dropout does:
            DyLoRA's mask of the rank that it drew. It is the optimizer's, so nothing saves, copies
            or merges it, and it is gone when the optimizer is.
        share_group: name of the group of layers that hold this same pair (DiffoRA's weight
            sharing); Delta-LoRA does not update their weights. None for a pair of the layer's own.
        pair_owner: the first layer of that group; None for it, and for a pair of the layer's own.
        base_layer: the layer that was here before; `unswap_` puts it back.
        base_parameters: the names of its parameters, all of which this layer holds.
        delta: what Delta-LoRA has added so far; None for plain LoRA.
        branch_delta: ``delta`` where the forward pass adds it, None where W holds all of it.
        swapped_in: False once `unswap_` or `merge_` took the layer out.
    """

    lora_alpha: float
    scaling: float
    lora_dropout: float
    backend: str | None
    transposed: bool
    base_parameters: tuple[str, ...]
    branch_delta: PendingDelta | None
    swapped_in: bool

    in_peft = False
    active = True

    def __init__(
        self,
        base_layer: "LinearLayer",
        lora_A: Tensor,
        lora_B: Tensor,
        lora_alpha: float,
        scaling: float,
        lora_dropout: float = 0.0,
        backend: str | None = None,
    ):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear_shape(base_layer)
        self.transposed, self.share_group = is_conv1d(base_layer), None
        self.register_parameter("bias", None)  # among the parameters, as in the base layer
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.r, self.scaling, self.backend = lora_A.shape[0], scaling, backend
        self.lora_alpha, self.lora_dropout = lora_alpha, lora_dropout
        self.delta = self.gate = None
        self.swapped_in = True
        # It is not registered as a submodule, because its parameters are this layer's.
        self.__dict__["base_layer"] = base_layer
        scales = scales_of(base_layer)
        self.base_parameters = ("weight", "bias", *scales)
        for name, scale in scales.items():
            self.register_parameter(name, scale)

    def pairs(self) -> dict[str, LoraLayer]:
        return {"": self}

    @property
    def delta(self) -> PendingDelta | None:
        return self._delta

    @delta.setter
    def delta(self, delta: PendingDelta | None) -> None:
        self._delta = delta
        # The forward pass reads nothing else of the delta, so that a compiled model need not be
        # compiled again when Delta-LoRA starts to write into W.
        self.branch_delta = None if delta is None or delta.in_weight else delta

    @property
    def matrix(self) -> Tensor:
        """W, (out_features, in_features): ``weight`` or its transpose, never a copy."""
        return self.weight.T if self.transposed else self.weight

    @property
    def adapter(self) -> list[nn.Parameter]:
        """The parameters that `swap_` added to the layer: the pair, and a gate that is trained."""
        gate = [self.gate] if isinstance(self.gate, nn.Parameter) else []
        return [self.lora_A, self.lora_B, *gate]

    def share_with_base(self) -> None:
        """Let the base layer hold the parameters that this layer holds.

        Sharding gives the layers of a model other ones. The base layer, which is not among them,
        would keep the whole weight in memory, so it looks for its parameters here where it can.
        """
        if self._shares_parameters():
            vars(self.base_layer)["_parameters"] = self._parameters
        else:
            self._give_back()

    def leave_base(self) -> None:
        """Give the base layer parameters of its own, which are those of this layer."""
        if self._shares_parameters():
            vars(self.base_layer)["_parameters"] = dict.fromkeys(self.base_parameters)
        self._give_back()

    def _give_back(self) -> None:
        for name in self.base_parameters:
            self.base_layer._parameters[name] = self._parameters.get(name)

    @property
    def holder(self) -> nn.Module:
        return self

    def places(self) -> list[Place]:
        held = self._parameters if "weight" in self._parameters else vars(self)
        return [(held, "weight", self.weight), (vars(self), "swapped_in", True)]

    def why_no_update(self) -> str | None:
        if self.lora_dropout:
            return f"lora_dropout={self.lora_dropout:g}, which Delta-LoRA forbids"
        if self.training_gate is not None:
            return "the ranks that a DyLoRA optimizer draws"
        if is_core(self.gate):
            return "FLoRA's core, whose product B G A is that of no pair"
        return None if self.gate is None else "a gate"

    @property
    def dispatch(self) -> Dispatch:
        """Which backend, and which kernels of it, run this layer in training, and why."""
        rank = self.r if self.branch_delta is None else self.branch_delta.rank
        path = base_format(self).path
        return path(self.base_layer, rank, self.lora_dropout, self.backend)

    def forward(self, x: Tensor) -> Tensor:
        return base_format(self).forward(self, x, *self._branch())

    def as_lora_linear(self, x: Tensor) -> LowRankLinear | None:
        a, b, scaling, gate, dropout = self._branch()
        weight = base_format(self).weight(self, x, a.shape[0])
        if dropout or weight is None:
            return None
        return LowRankLinear(weight, a, b, gate, self.bias, scaling)

    def _branch(self) -> tuple[Tensor, Tensor, float, Tensor | None, float]:
        """(A, B, scaling, gate, dropout) of the low-rank branch in a forward pass now."""
        a: Tensor = self.lora_A
        b: Tensor = self.lora_B
        scaling, gate, dropout = self.scaling, self.gate, 0.0
        if self.training:
            dropout = self.lora_dropout
            if self.training_gate is not None:
                gate = self.training_gate
        if self.branch_delta is not None:
            if gate is not None:
                raise SwapError("gate", "a gate beside a factored delta", "one of the two")
            if dropout:
                given = f"lora_dropout={dropout} on a layer whose branch holds a Delta-LoRA update"
                raise SwapError("lora_dropout", given, "0, or `merge_` first and swap again")
            a, b, gate, scaling = self.branch_delta.stack(a, b, scaling)
        if is_core(gate):
            a, b = fold_core(a, b, gate)
            gate = None
        return a, b, scaling, gate, dropout

    def extra_repr(self) -> str:
        dropout = f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}{dropout}"

    # ---------------------------------------------------------- moves, and the layer's state

    def _apply(self, fn: Any, recurse: bool = True) -> "LoraLinear":
        before = self.matrix.detach()
        super()._apply(fn, recurse)
        if self.delta is not None:
            follow_weight(self.delta, before, self.matrix)
            follow_module(self.delta, self.lora_A, self.lora_B)
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.delta is not None:
            destination |= delta_to_state(self.delta, f"{prefix}delta.", *self.adapter[:2])

    def check_state(self, state: dict[str, Any], prefix: str) -> None:
        pair = (state.get(f"{prefix}{name}") for name in PAIR)
        check_saved_delta(state, f"{prefix}delta.", self, *pair)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        pair = (state_dict.get(f"{prefix}{name}") for name in PAIR)
        saved = take_saved_delta(state_dict, f"{prefix}delta.", self, *pair)
        check_loadable(self.delta, saved)
        keeps = self.delta is not None and self.delta.remainder is not None
        before = self.matrix.detach().clone() if keeps else None
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if any(f"{prefix}{name}" not in state_dict for name in PAIR):
            return  # a part of a state, which says nothing of the update
        load_delta(self, saved, self.lora_A, self.lora_B)
        if self.delta is not None and before is not None:
            follow_loading(self.delta, before, self.matrix)


def own_layers(model: nn.Module, call: str, instead: str) -> dict[str, LoraLinear]:
    """The `LoraLinear` layers of a swapped model by name, for a call that is for them alone.

    Raises:
        SwapError: the model has no swapped layer, or has layers of PEFT; the message names what to
            call ``instead``.
    """
    layers: dict[str, LoraLinear] = {}
    for name, layer in swapped_layers(model).items():
        if not isinstance(layer, LoraLinear):
            raise SwapError(call, f"{name}, a layer of PEFT", f"for PEFT's layers, {instead}")
        layers[name] = layer
    return layers


def check_unsharded(layers: dict[str, LoraLinear], call: str) -> None:
    """Raise SwapError where a layer is sharded, for a call that gives it another pair."""
    for name, layer in layers.items():
        if is_sharded(layer.weight) or is_sharded(layer.lora_A):
            accepted = "a whole model: `save_adapter` here, then `load_adapter` on the base"
            raise SwapError(call, f"{name}, which FSDP has sharded", accepted)
