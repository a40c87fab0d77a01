"""The product inside of a gated MLP, h = act(e) * g, and its gradients, without autograd."""

import contextlib

import torch
from torch import Tensor

from .dispatch import choose_path
from .reference_blocks import gated_product_ref

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels import gated_product as kernels


def gated_product(e: Tensor, g: Tensor, activation: str) -> Tensor:
    """h (M, N) in the dtype of e.

    Args:
        e, g: (M, N), their rows contiguous.
        activation: "silu", "gelu_tanh" or "gelu".
    """
    if choose_path(e.device, e.dtype).backend == "triton":
        return kernels.gated_product(e, g, activation)
    return gated_product_ref(e, g, activation)


def gated_product_bwd(
    e: Tensor, g: Tensor, dh: Tensor, activation: str, de: Tensor, dg: Tensor
) -> None:
    """Write the gradients for e and g into ``de`` and ``dg``; these may be e, g and dh."""
    if choose_path(e.device, e.dtype).backend == "triton":
        kernels.gated_product_bwd(e, g, dh, activation, de, dg)
        return
    with torch.enable_grad():
        e, g = (t.detach().requires_grad_() for t in (e, g))
        found = torch.autograd.grad(gated_product_ref(e, g, activation), (e, g), dh)
    for target, gradient in zip((de, dg), found, strict=True):
        target.copy_(gradient)


def takes_da(e: Tensor, r: int) -> bool:
    """Whether `gated_product_bwd_and_da` runs for tensors like e and this rank."""
    on_gpu = choose_path(e.device, e.dtype).backend == "triton"
    return on_gpu and r <= kernels.LARGEST_RANK and e.numel() > 0


def gated_product_bwd_and_da(
    e: Tensor, g: Tensor, dh: Tensor, v: Tensor, r: int, activation: str, de: Tensor, dg: Tensor
) -> Tensor:
    """`gated_product_bwd`, and dA (r, N) = V^T h in float32, for which h is not written again.

    ``v`` is V = s g dY B of the layer that reads h, (M, r or more columns), in the dtype of e.
    """
    return kernels.gated_product_bwd_and_da(e, g, dh, v, r, activation, de, dg)
