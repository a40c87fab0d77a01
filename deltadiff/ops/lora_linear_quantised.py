"""`lora_linear` over weights of few bits, as operations of PyTorch that torch.compile can follow.

For each format of `quantised`, "4bit" and "fp8":

    lora_linear_<format>        y, with its gradients
    lora_linear_<format>_fwd    (y, what is kept) of a forward pass
    lora_linear_<format>_bwd    (dx, dA, dB, dgate) of a backward pass

W is decoded inside of each pass, where torch.compile does not see it and cannot keep it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .decode_4bit import FourBit
from .decode_fp8 import Float8
from .lora_linear_passes import LoraLinearFunction, bwd_over, fwd_over, kept_shape
from .quantised import Quantised, operation

_LIBRARY = torch.library.Library("deltadiff", "FRAGMENT")  # lives as long as this module


def lora_linear_quantised(x: Tensor, weight: Quantised, *rest: object) -> Tensor:
    """`LoraLinearFunction` over few bits for a compiled model; the arguments are the same."""
    return operation(weight, "")(x, *weight.parts, *rest)


def _define(name: str, kind: Any, weight: str) -> None:
    """Define the operations over weights of one kind, which stand there as their `parts`."""
    count = len(weight.split(","))
    forward = (
        f"(Tensor x, {weight}, Tensor lora_A, Tensor lora_B, float scaling, Tensor? gate, "
        "Tensor? bias, float dropout, Tensor? seed, str backend)"
    )
    _LIBRARY.define(f"{name}{forward} -> Tensor")
    _LIBRARY.define(f"{name}_fwd{forward} -> (Tensor y, Tensor S)")
    _LIBRARY.define(
        f"{name}_bwd(Tensor dy, Tensor? x, {weight}, Tensor lora_A, Tensor lora_B, "
        "Tensor S, float scaling, Tensor? gate, bool[4] needs, float dropout, Tensor? seed, "
        "str backend) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dgate)"
    )

    def split(args: Sequence[Any]) -> tuple[Quantised, Sequence[Any]]:
        """The weight, and the arguments after it, which begin with lora_A and lora_B."""
        lora_A, lora_B = args[count : count + 2]
        return kind.from_parts(args[:count], (lora_B.shape[0], lora_A.shape[1])), args[count:]

    def differentiable(x: Tensor, *args: Any) -> Tensor:
        weight, rest = split(args)
        return LoraLinearFunction.apply(x, weight, *rest)

    def fwd(x: Tensor, *args: Any) -> Sequence[Tensor]:
        weight, rest = split(args)
        return fwd_over(x, weight, *rest)

    def bwd(dy: Tensor, x: Tensor | None, *args: Any) -> Sequence[Tensor | None]:
        weight, rest = split(args)
        return bwd_over(dy, x, weight, *rest)

    def fwd_shapes(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        lora_A, lora_B, _, gate, *_, backend = args[count:]
        shape = kept_shape(backend, x.shape[0], lora_A.shape[0], gate is not None)
        dtype = x.dtype if backend == "cpp" else torch.float32
        return x.new_empty((x.shape[0], lora_B.shape[0])), x.new_empty(shape, dtype=dtype)

    def bwd_shapes(dy: Tensor, x: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
        lora_A, lora_B, _, _, gate, needs, *_ = args[count:]
        dx = dy.new_empty((dy.shape[0], lora_A.shape[1]))
        dgate = None if gate is None else torch.empty_like(gate)
        made = (dx, torch.empty_like(lora_A), torch.empty_like(lora_B), dgate)
        return tuple(t if need else None for t, need in zip(made, needs, strict=True))

    _LIBRARY.impl(name, differentiable, "CompositeImplicitAutograd")
    _LIBRARY.impl(f"{name}_fwd", fwd, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}_bwd", bwd, "CompositeExplicitAutograd")
    for passes, shapes in (("fwd", fwd_shapes), ("bwd", bwd_shapes)):
        torch.library.register_fake(f"deltadiff::{name}_{passes}", shapes, lib=_LIBRARY)


_define(
    "lora_linear_4bit",
    FourBit,
    "Tensor packed, Tensor absmax, Tensor code, Tensor? scale, Tensor? scale_code, "
    "Tensor? offset, int blocksize, int scale_blocksize",
)
_define("lora_linear_fp8", Float8, "Tensor data, Tensor scale, int block_rows, int block_columns")
