"""`low_rank_sum`: all that training added to a layer's original weight, as one product B A."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, SwapError
from ..ranks import whole
from .lora_layers import LoraLayer
from .low_rank_factors import LowRankFactors
from .merge import branch_products
from .pending_delta import PendingDelta


def low_rank_sum(name: str, pairs: Sequence[LoraLayer]) -> tuple[Tensor, Tensor]:
    """(B, A), float32 on the CPU, with W_0 + B A the weight that the trained layer acts as.

    That holds whether W was written in place or not: W_0 is the original weight. The sum is formed
    in float64 and rounded once. Terms with the same row of A are added up, and terms that are zero
    are left out, so the rank is the least that can be told without a decomposition: r for plain
    LoRA, 2r for Delta-LoRA with one lambda and r more for each further one. It is at least 1 and
    at most the smaller side of the weight.

    Args:
        name: of the layer, for errors.
        pairs: its pairs; PEFT's layers may have several.

    Raises:
        ArgumentTypeError: a factor is on meta.
        SwapError: the update of W is not kept as factors.
    """
    products = [product for pair in pairs for product in _products(name, pair)]
    a = torch.cat([whole_on_cpu(name, p.A).double() for p in products])
    b = torch.cat([whole_on_cpu(name, p.B).double() for p in products], dim=1)
    places: dict[bytes, int] = {}
    place = torch.tensor([places.setdefault(row.tobytes(), len(places)) for row in a.numpy()])
    b = b.new_zeros(b.shape[0], len(places)).index_add_(1, place, b)
    a = a.new_zeros(len(places), a.shape[1]).index_copy_(0, place, a)
    needed = (a != 0).any(1) & (b != 0).any(0)
    needed[0] |= not needed.any()
    a, b = a[needed], b[:, needed]
    (n, r), k = b.shape, a.shape[1]
    if r > min(n, k):
        a, b = (b @ a, torch.eye(n)) if n < k else (torch.eye(k), b @ a)
    return b.float(), a.float()


def _products(name: str, pair: LoraLayer) -> list[LowRankFactors]:
    """What the forward pass adds to W, and what W holds of the updates by now."""
    delta, products = pair.delta, branch_products(pair)
    if delta is not None:
        check_known(name, delta)
        products += [p for p in delta.past_updates or () if p.in_weight]
        if delta.in_weight and delta.started():
            products.append(delta.product())
    return products


def check_known(name: str, delta: PendingDelta) -> None:
    """Raise SwapError where the update of a layer cannot be told as factors."""
    if delta.known():
        return
    given = "an update of W by too many values of update_ratio to be kept as factors"
    if delta.past_updates is not None:
        given = "a pair that was written through .data, or between replays of a captured step"
    accepted = "`merge_`, then save the whole model"
    if not delta.in_weight:
        accepted = "states of model and optimizer from before, loaded into both"
    raise SwapError(name, given, accepted)


def whole_on_cpu(name: str, t: Tensor) -> Tensor:
    """All of the tensor, contiguous on the CPU and no view of another.

    Of a sharded one, all processes ask for it.

    Raises:
        ArgumentTypeError: it has no memory.
    """
    if t.is_meta:
        raise ArgumentTypeError(name, "a tensor on meta", "tensors that were loaded")
    return whole(t).cpu().clone(memory_format=torch.contiguous_format)
