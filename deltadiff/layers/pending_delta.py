"""`PendingDelta`: the update W_T - W_0 of Delta-LoRA, kept as low-rank factors.

With a constant update ratio lambda the updates of Algorithm 1 telescope:

    W_T - W_0 = lambda s (B_T A_T - B_k A_k)

where A_k, B_k (the *anchors*) are the factors before the first step that updates W. So a layer can
hold the update in two ways: inside W ("inplace"), or as a product of rank 2r that the forward pass
adds while W is never written ("factored"):

    y = x W_0^T + s [(1 + lambda) B, -lambda B_k] [A; A_k] x
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..ops.transforms import transformed


@dataclass
class LowRankFactors:
    """A part of W_T - W_0 as the product B A of two factors.

    Attributes:
        B, A: (out_features, rank) and (rank, in_features).
        in_weight: True where W holds the product, False where the forward pass adds it.
    """

    B: Tensor
    A: Tensor
    in_weight: bool


@dataclass
class PendingDelta:
    """W_T - W_0 as low-rank factors: lambda s (B A - B_k A_k), plus the past updates.

    Attributes:
        anchor_A, anchor_B: A_k and B_k, of the shapes and dtype of lora_A and lora_B.
        update_ratio: lambda.
        scaling: s, as it was when this update began. The layer's own may change later, for instance
            by PEFT's ``set_scale``, and scales the pair alone.
        rank_scale: (2r,) on the device: 1 + lambda (r times), -lambda (r times) once the updates
            have started, before that 1 and 0. A tensor, so that starting needs no host read.
        in_weight: True where W holds the update, False where the forward pass adds it.
        remainder: what a 16-bit W could not hold, for rounding="remainder".
        past_updates: the updates under earlier values of lambda and in earlier runs; None once
            there were too many of them to keep.
        told_saturated: whether the user knows that a float16 W reached the end of its range.
    """

    anchor_A: Tensor
    anchor_B: Tensor
    update_ratio: float
    scaling: float
    rank_scale: Tensor
    in_weight: bool
    remainder: Tensor | None = None
    past_updates: list[LowRankFactors] | None = field(default_factory=list)
    told_saturated: bool = False

    @staticmethod
    def make_rank_scale(update_ratio: float, r: int, like: Tensor, started: bool) -> Tensor:
        wide = wide_dtype(like.dtype)
        on = update_ratio if started else 0.0
        return torch.tensor([1 + on] * r + [-on] * r, dtype=wide, device=like.device)

    @property
    def rank(self) -> int:
        """The rank of the one low-rank product that the forward pass needs; see `stack`."""
        added = [p.A.shape[0] for p in self.past_updates or () if not p.in_weight]
        return self.rank_scale.shape[0] + sum(added)

    def started(self) -> bool:
        """Whether W has been updated. Reads one value from the device."""
        return bool(self.rank_scale[-1] != 0)

    def factor(self) -> float:
        """lambda s, the factor of the difference of products."""
        return self.update_ratio * self.scaling

    def product(self, lora_A: Tensor, lora_B: Tensor) -> LowRankFactors:
        """lambda s (B A - B_k A_k) as two factors of rank 2r, float32 (float64 stays)."""
        wide, c = self.rank_scale.dtype, self.factor()
        b = torch.cat([c * lora_B.detach().to(wide), -c * self.anchor_B.to(wide)], dim=1)
        a = torch.cat([lora_A.detach().to(wide), self.anchor_A.to(wide)])
        return LowRankFactors(b, a, self.in_weight)

    def unwritten(self, lora_A: Tensor, lora_B: Tensor) -> list[LowRankFactors]:
        """What the forward pass adds to W of the update, as factors; reads from the device."""
        found = [p for p in self.past_updates or () if not p.in_weight]
        if not self.in_weight and self.started():
            found.append(self.product(lora_A, lora_B))
        return found

    def changes_model(self) -> bool:
        """Whether the model is another than its base and its pairs; reads from the device."""
        return self.started() or self.past_updates is None or bool(self.past_updates)

    def added(self, lora_A: Tensor, lora_B: Tensor) -> list[LowRankFactors]:
        """As `unwritten`, without a read from the device: zero before the updates have started."""
        wide, r = self.rank_scale.dtype, lora_A.shape[0]
        factor = self.rank_scale.clone()
        factor[:r] -= 1
        b = torch.cat([lora_B, self.anchor_B], dim=1).to(wide) * (factor * self.scaling)
        a = torch.cat([lora_A, self.anchor_A]).to(wide)
        past = [p for p in self.past_updates or () if not p.in_weight]
        return [*past, LowRankFactors(b, a, in_weight=False)]

    def stack(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """(A, B, gate, scaling) of the one low-rank product that the forward pass needs.

        ``scaling``: s of the pair now. Where it is that of the update too, the rank is the least.
        """
        if isinstance(scaling, Tensor) or scaling != self.scaling or scaling == 0:
            return self._stack_apart(lora_A, lora_B, scaling)
        scale = self.rank_scale
        stack = _stack_transformed if transformed() else _Stack.apply
        a, b = stack(lora_A, lora_B, self.anchor_A, self.anchor_B, scale)
        added = [p for p in self.past_updates or () if not p.in_weight]
        if added:
            b = torch.cat([b, *(p.B.to(b.dtype) / scaling for p in added)], dim=1)
            a = torch.cat([a, *(p.A.to(a.dtype) for p in added)])
            scale = torch.cat([scale, scale.new_ones(a.shape[0] - scale.shape[0])])
        return a, b, scale, scaling

    def _stack_apart(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """As `stack`: the pair with its own scale, and the update, a constant, beside it."""
        r, wide = lora_A.shape[0], self.rank_scale
        past = [p for p in self.past_updates or () if not p.in_weight]
        constant = lora_A.detach(), self.anchor_A, *(p.A.to(lora_A.dtype) for p in past)
        a = torch.cat([lora_A, *constant])
        constant = lora_B.detach(), self.anchor_B, *(p.B.to(lora_B.dtype) for p in past)
        b = torch.cat([lora_B, *constant], dim=1)
        factors = self.scaling * (wide[:r] - 1), self.scaling * wide[r:]
        ones = wide.new_ones(a.shape[0] - 3 * r)
        return a, b, torch.cat([scaling * wide.new_ones(r), *factors, ones]), 1.0


class _Stack(torch.autograd.Function):
    """[A; A_k] and [B, B_k], with the gradients of A and B as Algorithm 1 has them.

    W is a constant to autograd, so the backward pass divides the factor 1 + lambda out again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        lora_A: Tensor,
        lora_B: Tensor,
        anchor_A: Tensor,
        anchor_B: Tensor,
        rank_scale: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rank_scale)
        ctx.r = lora_A.shape[0]
        return torch.cat([lora_A, anchor_A]), torch.cat([lora_B, anchor_B], dim=1)

    @staticmethod
    def backward(
        ctx: Any, grad_A: Tensor, grad_B: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        (rank_scale,) = ctx.saved_tensors
        grad_A = grad_A[: ctx.r] / rank_scale[0].to(grad_A.dtype)
        grad_B = grad_B[:, : ctx.r] / rank_scale[0].to(grad_B.dtype)
        return grad_A, grad_B, None, None, None


def _stack_transformed(
    lora_A: Tensor, lora_B: Tensor, anchor_A: Tensor, anchor_B: Tensor, rank_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`_Stack` in PyTorch's operations, which transforms of torch.func can follow."""

    def divided(p: Tensor) -> Tensor:
        """``p``, bit by bit, with its derivatives divided by 1 + lambda."""
        return p.detach() + (p - p.detach()) / rank_scale[0].to(p.dtype)

    a, b = divided(lora_A), divided(lora_B)
    return torch.cat([a, anchor_A]), torch.cat([b, anchor_B], dim=1)
