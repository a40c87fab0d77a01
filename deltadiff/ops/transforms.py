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


def wants_reference(dy: torch.Tensor) -> bool:
    """Whether a backward pass has to be made of PyTorch's own operations.

    It has, if its results are differentiated in turn (``create_graph=True``), or if ``dy`` stands
    for several gradients at a time (``is_grads_batched=True``).
    """
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy)


def refuse_transforms(op: str) -> None:
    """Raise where an operation that writes its tensors in place is called under a transform."""
    if transformed():
        accepted = "a call outside: it writes in place, which has no derivative"
        raise ArgumentError(op, f"a call under {TRANSFORMED}", accepted)
