"""bitsandbytes' 4-bit layers as base layers: when `lora_linear` computes what they would, and how.

Such a layer computes in a dtype of its own, ``compute_dtype``, whatever the dtype of its input is,
and gives out that of its input. So does the fused pass: it decodes W in that dtype. Where the layer
does anything else than its class says, or `choose_4bit_path` says so, the layer itself is called,
and the low-rank branch is added to its output (see `base_format`).
"""

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, SwapError
from ..kernels.runtime.dtypes import DTYPES as KERNEL_DTYPES
from ..ops.decode_4bit import FourBit
from ..ops.dispatch import Dispatch, choose_4bit_path
from ..ranks import is_partitioned, is_sharded, local
from .fused_branch import fused_branch
from .linear import linear_shape
from .quantised_format import QuantisedFormat, why_called

_LAYERS = ("Linear4bit", "LinearNF4", "LinearFP4")


def is_four_bit(weight: object) -> bool:
    """Whether this is the weight of a 4-bit layer of bitsandbytes."""
    kind = type(weight)
    return kind.__name__ == "Params4bit" and kind.__module__.startswith("bitsandbytes.")


def stores_four_bits(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes, or of a class made of those.

    The weight does not tell: where `fully_shard` splits it, and where it makes it whole again, it
    is a tensor of the dtype in which the bytes are stored, ``quant_storage``.
    """
    kind = type(module)
    if kind is nn.Linear:  # what most layers are
        return False
    return any(
        each.__name__ == "Linear4bit" and each.__module__.startswith("bitsandbytes.")
        for each in kind.__mro__
    )


def state_of(base: Any) -> Any:
    """The ``quant_state`` of a 4-bit layer, which holds the scales; None where there is none yet.

    A weight of which FSDP made another parameter has lost it. The layer holds it, too.
    """
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)


def is_four_bit_layer(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes, and none of a class made of those."""
    kind = type(module)
    return kind.__name__ in _LAYERS and kind.__module__.startswith("bitsandbytes.")


def _compute_dtype(base: Any, x: Tensor | None) -> torch.dtype:
    """The layer's own dtype, or where it has none, that of x.

    Passes to come are supposed to get inputs of the dtype that its weight was quantised from.
    """
    given = state_of(base).dtype if x is None else x.dtype
    return base.compute_dtype or given


def _changes_dtype(base: Any, x: Tensor) -> bool:
    dtype, device = _compute_dtype(base, x), x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype
    return x.dtype != dtype or autocast


def _path(base: Any, r: int, dropout: float, backend: str | None) -> Dispatch:
    """What runs a 4-bit layer with a branch of rank r: a backend of `lora_linear`, or the layer.

    The latter is called backend "reference".

    Raises:
        BackendUnavailableError: ``backend`` cannot run it here.
    """
    weight = _weight_of(base)
    if isinstance(weight, str):
        return _own_product(weight)
    dtype = _compute_dtype(base, None)
    path = choose_4bit_path(*_call(weight, dtype, r, dropout, backend))
    if path.backend == "reference":
        return _own_product(path.reason)
    return replace(path, reason=f"{path.reason}; 4-bit weight: decoded in each pass")


def _own_product(reason: str) -> Dispatch:
    return Dispatch("reference", f"4-bit weight: the base layer's own product ({reason})")


def _runs_fused(weight: FourBit, *call: Any) -> bool:
    return _is_fused(*_call(weight, *call))


@torch.compiler.assume_constant_result
def _is_fused(*call: Any) -> bool:
    return choose_4bit_path(*call).backend != "reference"


def _call(
    weight: FourBit, dtype: torch.dtype, r: int, dropout: float, backend: str | None
) -> tuple[Any, ...]:
    layer = (*weight.shape, r)
    return weight.device, dtype, backend, layer, dropout > 0, weight.blocksize


def _weight_of(base: Any) -> FourBit | str:
    """The weight, where `lora_linear` computes what this layer would, else in words why not.

    While a weight is split over processes, it is this one's part, which tells as much to whoever
    asks for the path of passes to come.

    Raises:
        SwapError: FSDP's mixed precision has cast the bytes, as if they were numbers.
    """
    if not is_four_bit_layer(base):
        return f"{type(base).__name__} has a forward pass of its own"
    called = why_called(base)
    if called is not None:
        return called
    if base.compute_dtype not in (None, *KERNEL_DTYPES):
        return f"it computes in {base.compute_dtype}"
    stored, state = base.weight, state_of(base)
    in_parts = is_sharded(stored) or is_partitioned(stored)
    if state is not None and not is_four_bit(stored) and not in_parts:
        packed = -(-math.prod(state.shape) // 2)
        if stored.nbytes != packed:
            given = f"{stored.nbytes} bytes of {stored.dtype} in the place of {packed}"
            accepted = "a quant_storage of uint8, or of FSDP's param_dtype, which it is not cast to"
            raise SwapError("a 4-bit weight", given, accepted)
    try:
        weight = FourBit.of(local(stored), state)
    except ArgumentError as error:
        return error.given
    if weight.shape != linear_shape(base):
        return f"it was quantised as {weight.shape[0]} x {weight.shape[1]}"
    return weight


def _branch(
    x: Tensor,
    base: Any,
    weight: Any,
    a: Tensor,
    b: Tensor,
    scaling: float,
    gate: Tensor | None,
    dropout: float,
    backend: str | None,
) -> Tensor:
    """`fused_branch` in the dtype in which a 4-bit layer computes, given out in that of x."""
    dtype, bias, device = _compute_dtype(base, x), base.bias, x.device.type
    bias = None if bias is None else bias.to(dtype)
    off: Any = contextlib.nullcontext()
    if torch.is_autocast_enabled(device):  # to which the layer pays no heed
        off = torch.autocast(device, enabled=False)
    with off:
        y = fused_branch(x.to(dtype), weight, bias, a, b, scaling, gate, dropout, backend)
    return y.to(x.dtype)


FOUR_BIT = QuantisedFormat(
    weight_of=_weight_of,
    compute_dtype=_compute_dtype,
    changes_dtype=_changes_dtype,
    runs_fused=_runs_fused,
    path=_path,
    branch=_branch,
)
