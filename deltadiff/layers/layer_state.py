"""`LayerState`: what a swapped layer keeps in a model's state, and what it shares with others.

A swapped model's ``state_dict`` holds all that its forward pass needs:

    weight, bias, ...    what the layer that was there before would save, with bitsandbytes' scales
    lora_A, lora_B       the pair; one that several layers share is there once, under the first
    gate                 where there is one
    delta.*              what Delta-LoRA has added, see `delta_state`

A state in which every layer has its own copy of a shared pair loads too, if the copies are equal.
"""

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ranks import local
from .four_bit import stores_four_bits
from .fp8 import is_fp8_layer, keeping_fp8, why_not_loadable
from .gate import fits_rank
from .linear import is_conv1d

if TYPE_CHECKING:
    from .linear import LinearLayer

PAIR = ("lora_A", "lora_B")
_OWN = (*PAIR, "gate")


class LayerState(nn.Linear):
    """The part of `LoraLinear` that saves, loads, moves and copies it."""

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]  # nn.Linear says Parameter, which may be None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    gate: Tensor | None
    share_group: str | None
    base_layer: "LinearLayer"
    pair_owner: "LayerState | None" = None
    _training_gate: Callable[[], Tensor | None] | None = None

    # ----------------------------------------------------------------- shared pairs

    def share_pair(self, owner: "LayerState", group: str | None) -> None:
        """Train the pair of ``owner``, which stands before this layer in the model."""
        self.share_group = group
        self.__dict__["pair_owner"] = None if owner is self else owner  # it is no submodule
        self._take_pair()

    def _take_pair(self) -> None:
        """Hold the parameters that the owner of a shared pair holds now."""
        if self.pair_owner is not None:
            self.lora_A, self.lora_B = self.pair_owner.lora_A, self.pair_owner.lora_B

    def _apply(self, fn: Any, recurse: bool = True) -> "LayerState":
        super()._apply(keeping_fp8(self, fn), recurse)
        self._take_pair()  # `to_empty` makes new parameters
        return self

    # ------------------------------------------------------------- the gate of training

    @property
    def training_gate(self) -> Tensor | None:
        gate = self._training_gate
        return None if gate is None else gate()

    @training_gate.setter
    def training_gate(self, gate: Tensor | None) -> None:
        self._training_gate = None if gate is None else weakref.ref(gate)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: the optimizer that owns the gate of training gives it again."""
        return {**self.__dict__, "_training_gate": None}

    # ------------------------------------------------------------------------ state

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # The base layer comes first, for bitsandbytes may repack the weight when it is saved.
        of_base = {}
        if not self._has_plain_base():
            of_base = self._state_of_base(prefix, keep_vars)
        shared = self.pair_owner is not None and self._pair_is_in(destination)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in of_base.items():
            destination.setdefault(name, value)
        if shared:
            for name in PAIR:
                del destination[prefix + name]
        if self.gate is not None and "gate" not in self._parameters:
            # A copy, because several layers may hold the same tensor or views of one.
            destination[f"{prefix}gate"] = self.gate.detach().clone()

    def _pair_is_in(self, destination: dict) -> bool:
        """Whether another layer has saved this layer's pair there."""
        place = local(self.lora_A).data_ptr()
        return any(
            local(value).data_ptr() == place
            for name, value in destination.items()
            if name.endswith(PAIR)
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = dict(state_dict)
        if self.pair_owner is not None:
            self._take_pair()  # ``assign`` gives the owner new parameters
            error_msgs += self._use_owners_pair(state, prefix)
        if "gate" not in self._parameters:
            self._load_gate(state, f"{prefix}gate", missing_keys, error_msgs)
        error_msgs += why_not_loadable(self, state, prefix)
        if not self._has_plain_base():
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._load_base(state, prefix, assign, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _use_owners_pair(self, state: dict[str, Any], prefix: str) -> list[str]:
        """Put the owner's pair, which is loaded, into ``state``; returns what speaks against it."""
        errors = []
        for name in PAIR:
            own = getattr(self, name)
            saved = state.get(prefix + name, own)
            if not _same_values(saved, own):
                errors.append(
                    f"{prefix}{name} is not the one that the group {self.share_group!r} shares: "
                    "load the state of a whole model that was swapped alike"
                )
            state[prefix + name] = own
        return errors

    @torch.no_grad()
    def _load_gate(
        self, state: dict[str, Any], key: str, missing_keys: list[str], error_msgs: list[str]
    ) -> None:
        """Load a gate that is no parameter; a layer without one gets it."""
        saved = state.pop(key, None)
        if saved is None:
            missing_keys += [] if self.gate is None else [key]
        elif not fits_rank(saved.shape, self.r):
            error_msgs.append(f"{key} has shape {tuple(saved.shape)}, the layer has rank {self.r}")
        elif self.gate is None:
            self.gate = saved.detach().clone().to(self.lora_A.device)
        elif self.gate.shape != saved.shape:
            error_msgs.append(f"{key} has shape {tuple(saved.shape)}, not {tuple(self.gate.shape)}")
        else:
            self.gate.copy_(saved)

    # ------------------------------------------------------- the state of the base layer

    def _has_plain_base(self) -> bool:
        """Whether its parameters, which this layer holds too, are all that the base would save."""
        base = self.base_layer
        return type(base) is nn.Linear or is_conv1d(base) or is_fp8_layer(base)

    def _shares_parameters(self) -> bool:
        """Whether the base layer may look for its parameters among those of this layer."""
        return self._has_plain_base() or stores_four_bits(self.base_layer)

    def _state_of_base(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        """What the base layer would save, without what is this layer's.

        That of a sharded layer of bitsandbytes is without scales, as it is without deltadiff:
        torch.distributed.checkpoint looks for all entries among a model's attributes.
        """
        state = self.base_layer.state_dict(prefix=prefix, keep_vars=keep_vars)
        return {k: v for k, v in state.items() if k.removeprefix(prefix) not in _OWN}

    def _load_base(
        self,
        state: dict[str, Any],
        prefix: str,
        assign: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Let the base layer load what is its own; ``state`` keeps what is this layer's."""
        base, theirs = self.base_layer, {}
        for key in [key for key in state if key.startswith(prefix)]:
            if key.removeprefix(prefix) not in _OWN:
                theirs[key.removeprefix(prefix)] = state.pop(key)
        kind, weight = type(base.weight), theirs.get("weight")
        other_weight = weight is None or not _same_values(weight, base.weight)
        try:
            result = base.load_state_dict(theirs, strict=False, assign=assign)
        except RuntimeError as error:  # torch's, which lists shapes that differ
            error_msgs.append(f"{prefix}: {error}")
        else:
            left = _load_prequantised(base, kind, theirs, result.unexpected_keys)
            kept = self._state_of_base()
            missing = dict.fromkeys(key for key in result.missing_keys if key not in _OWN)
            if other_weight:  # else a state without its scales, as once was saved, is good enough
                missing |= dict.fromkeys(key for key in kept if key not in theirs)
            missing_keys += [prefix + key for key in missing]
            for key in left:
                if key not in kept:
                    unexpected_keys.append(prefix + key)
                elif not _same_values(theirs[key], kept[key]):
                    error_msgs.append(
                        f"{prefix}{key} is another than in this model, and {type(base).__name__} "
                        "cannot load it: load the base model from its own files, then `swap_` it"
                    )
        for name in ("weight", "bias"):  # ``assign`` makes new parameters
            if self._parameters.get(name) is not None:
                setattr(self, name, getattr(base, name))
                state[prefix + name] = getattr(self, name)


def _load_prequantised(
    base: Any, kind: Any, state: dict[str, Any], unexpected: list[str]
) -> list[str]:
    """Give bitsandbytes' 4-bit layers the scales in ``state``; returns the keys that are no scales.

    Their weight, of class ``kind``, cannot load scales, but its class makes a weight of them.
    """
    scales = [key for key in unexpected if key.startswith("weight.")]
    if not scales or not hasattr(kind, "from_prequantized"):
        return unexpected
    w = base.weight
    base.weight = kind.from_prequantized(
        data=w.data, quantized_stats={key: state[key].clone() for key in scales},
        requires_grad=w.requires_grad, device=w.device, module=base,
    )  # fmt: skip
    return [key for key in unexpected if key not in scales]


def _same_values(a: Any, b: Any) -> bool:
    """Whether two entries of a state hold the same; without values, as on meta, they may."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a is b or a.is_meta or b.is_meta:
        return True
    return a.shape == b.shape and torch.equal(a.detach().to(b.device, b.dtype), b.detach())
