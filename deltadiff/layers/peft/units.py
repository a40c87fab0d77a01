"""Modules inside of a layer of PEFT that are units of FSDP2 of their own.

PEFT's policy for FSDP, which transformers' Trainer sets, calls `fully_shard` on each lora_A and
lora_B alone. FSDP gathers the weight of such a unit when the module is called, and frees it
afterwards; another hook on the output gathers it again for the backward pass. `lora_linear` calls
no module, so `run_inside` lets it run as the forward pass of these modules, one inside of another.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ranks import FSDP, is_sharded, is_unit, why_no_shard


def is_own_hook(module: nn.Module, hook: object) -> bool:
    """Whether FSDP put this hook on the module, so that `run_inside` calls it."""
    return is_unit(module) and getattr(hook, "__module__", "").startswith(FSDP)


def becomes_whole(module: Any) -> bool:
    """Whether a module's weight is sharded as FSDP does it, which makes it whole for a call."""
    return is_sharded(module.weight) and why_no_shard(module.weight) is None


def dtype_in_passes(module: Any) -> torch.dtype:
    """The dtype of a module's weight while the module runs: a unit may have a policy for it."""
    own = module.weight.dtype
    return (module._get_fsdp_state()._mp_policy.param_dtype or own) if is_unit(module) else own


def dtype_given_out(module: Any) -> torch.dtype | None:
    """The dtype to which a unit casts what it gives out; None where it casts nothing."""
    return module._get_fsdp_state()._mp_policy.output_dtype if is_unit(module) else None


def run_inside(
    units: Sequence[nn.Module], x: Tensor, compute: Callable[[Tensor], Tensor]
) -> Tensor:
    """``compute(x)``, as the forward pass of all of these modules.

    Whatever FSDP does around a call happens as it would there: gathering, freeing and prefetching
    of the weights in both passes, and the reduction of their gradients once that of x is known.
    """
    if not units:
        return compute(x)
    unit, inner = units[0], units[1:]

    def forward(given: Tensor) -> Tensor:
        # A policy may have cast the input, which can be taken back without loss: see `why_peft`.
        return run_inside(inner, given.to(x.dtype), compute)

    vars(unit)["forward"] = forward
    try:
        return unit(x)
    finally:
        del vars(unit)["forward"]
