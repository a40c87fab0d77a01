"""`lora_linear` over a weight of 4 bits, as operations of PyTorch that torch.compile can follow.

    lora_linear_4bit        y, with its gradients
    lora_linear_4bit_fwd    (y, what is kept) of a forward pass
    lora_linear_4bit_bwd    (dx, dA, dB, dgate) of a backward pass

W is decoded inside of each pass, where torch.compile does not see it and cannot keep it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decode_4bit import FourBit, decoded
from .lora_linear_passes import LoraLinearFunction, kept_shape, run_bwd, run_fwd

# A `FourBit` without its shape, which lora_A and lora_B tell.
_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, Tensor? scale, Tensor? scale_code, "
    "Tensor? offset, int blocksize, int scale_blocksize"
)
_LIBRARY = torch.library.Library("deltadiff", "FRAGMENT")  # lives as long as this module
_FORWARD = (
    f"(Tensor x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gate, "
    "Tensor? bias, float dropout, Tensor? seed, str backend)"
)
_LIBRARY.define(f"lora_linear_4bit{_FORWARD} -> Tensor")
_LIBRARY.define(f"lora_linear_4bit_fwd{_FORWARD} -> (Tensor y, Tensor S)")
_LIBRARY.define(
    f"lora_linear_4bit_bwd(Tensor dy, Tensor? x, {_WEIGHT}, Tensor lora_A, Tensor lora_B, "
    "Tensor S, float scaling, Tensor? gate, bool[4] needs, float dropout, Tensor? seed, "
    "str backend) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)"
)


def lora_linear_4bit(x: Tensor, weight: FourBit, *rest: object) -> Tensor:
    """`LoraLinearFunction` over 4 bits for a compiled model; the arguments are the same."""
    return torch.ops.deltadiff.lora_linear_4bit(x, *weight.tensors, *weight.blocksizes, *rest)


def _split(args: Sequence[Any]) -> tuple[FourBit, list[Any]]:
    """The weight of 4 bits, and the arguments after it, which begin with lora_A and lora_B."""
    *tensors, blocksize, scale_blocksize = args[:8]
    lora_A, lora_B = args[8:10]
    shape = lora_B.shape[0], lora_A.shape[1]
    return FourBit.from_parts(tensors, shape, (blocksize, scale_blocksize)), list(args[8:])


@torch.library.impl(_LIBRARY, "lora_linear_4bit", "CompositeImplicitAutograd")
def _differentiable(x: Tensor, *args: Any) -> Tensor:
    weight, rest = _split(args)
    return LoraLinearFunction.apply(x, weight, *rest)


@torch.library.impl(_LIBRARY, "lora_linear_4bit_fwd", "CompositeExplicitAutograd")
def _fwd(x: Tensor, *args: Any) -> Sequence[Tensor]:
    weight, (*rest, backend) = _split(args)
    return run_fwd(x, decoded(weight, x.dtype, backend), *rest, backend)


@torch.library.impl(_LIBRARY, "lora_linear_4bit_bwd", "CompositeExplicitAutograd")
def _bwd(dy: Tensor, x: Tensor | None, *args: Any) -> Sequence[Tensor | None]:
    weight, (*rest, backend) = _split(args)
    return run_bwd(dy, x, decoded(weight, dy.dtype, backend), *rest, backend)


@torch.library.register_fake("deltadiff::lora_linear_4bit_fwd", lib=_LIBRARY)
def _fwd_shapes(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    _, (lora_A, lora_B, _, gate, *_, backend) = _split(args)
    shape = kept_shape(backend, x.shape[0], lora_A.shape[0], gate is not None)
    dtype = x.dtype if backend == "cpp" else torch.float32
    return x.new_empty((x.shape[0], lora_B.shape[0])), x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("deltadiff::lora_linear_4bit_bwd", lib=_LIBRARY)
def _bwd_shapes(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    _, (lora_A, lora_B, _, _, gate, needs, *_) = _split(args)
    dx = dy.new_empty((dy.shape[0], lora_A.shape[1]))
    dgate = None if gate is None else torch.empty_like(gate)
    made = (dx, torch.empty_like(lora_A), torch.empty_like(lora_B), dgate)
    return tuple(t if need else None for t, need in zip(made, needs, strict=True))
