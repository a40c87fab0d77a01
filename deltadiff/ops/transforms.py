"""Whether derivatives are taken that the kernels do not have; the reference has them all."""

import torch
from torch.autograd import forward_ad

from ..errors import ArgumentError

TRANSFORMED = "a transform of torch.func, or forward-mode derivatives"
_torch_func_is_at_work = torch._C._are_functorch_transforms_active  # looked up once, for speed


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work.

    The kernels have one derivative, that of a backward pass, and take plain tensors. The reference
    consists of PyTorch's own operations, and follows all of these.
    """
    return _torch_func_is_at_work() or forward_ad._current_level >= 0


def refuse_transforms(op: str) -> None:
    """Raise where an operation that writes its tensors in place is called under a transform."""
    if transformed():
        accepted = "a call outside: it writes in place, which has no derivative"
        raise ArgumentError(op, f"a call under {TRANSFORMED}", accepted)
