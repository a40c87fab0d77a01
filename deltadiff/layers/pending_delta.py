"""`PendingDelta`: the update W_T - W_0 of Delta-LoRA, kept as low-rank factors.

With a constant update ratio lambda the updates of Algorithm 1 telescope:

    W_T - W_0 = lambda s (B_T A_T - B_k A_k)

where A_k, B_k (the *anchors*) are the factors before the first step that updates W. So a layer can
hold the update in two ways: inside W ("inplace"), or as a product of rank 2r that the forward pass
adds while W is never written ("factored"):

    y = x W_0^T + s [(1 + lambda) B, -lambda B_k] [A; A_k] x

A_T, B_T are the factors after the last step. The layer's own may be others since then: a model's
state was loaded, an average was swapped in, another optimizer trained them. Only steps update W, so
the update keeps copies of A_T and B_T. Where the pair is not equal to them, the forward pass adds
the update beside it at rank 3r. The next step ends it as a past update, and begins one from there.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..errors import SwapError
from ..kernels.runtime.gpu import is_capturing
from ..ops.transforms import transformed
from ..ranks import copy_values, gathered, is_partitioned, is_sharded, local, whole
from .low_rank_factors import LowRankFactors
from .saved_update import SavedUpdate, write_update

MAX_PAST_UPDATES = 8  # how many past updates are kept as factors


class Stamp(NamedTuple):
    """What tells at no cost whether a pair is still equal to the copies of it.

    A step writes both, so the distance of their version counters stays. Other writes change it.
    """

    writes_A: int
    writes_B: int
    address_A: int
    address_B: int


@dataclass
class PendingDelta:
    """W_T - W_0 as low-rank factors: lambda s (B_T A_T - B_k A_k), plus the past updates.

    Attributes:
        anchor_A, anchor_B: A_k and B_k, of the shapes and dtype of lora_A and lora_B.
        last_A, last_B: A_T and B_T, copies of lora_A and lora_B as the last step left them.
        update_ratio: lambda.
        scaling: s, as it was when this update began. The layer's own may change later, for instance
            by PEFT's ``set_scale``, and scales the pair alone.
        rank_scale: (2r,) on the device: 1 + lambda (r times), -lambda (r times) once the updates
            have started, before that 1 and 0. A tensor, so that starting needs no host read.
        in_weight: True where W holds the update, False where the forward pass adds it.
        remainder: what a 16-bit W could not hold, for rounding="remainder".
        remainder_of: the dtype of that W, to which alone it can be added; None if not known.
        past_updates: the updates under earlier values of lambda, by earlier pairs and in earlier
            runs; None once there were too many of them to keep.
        unseen: numbers on the device, not 0 once A or B were written where only a kernel could see
            it, so that the update is not known any more; see `known`.
        told_saturated: whether the user knows that a float16 W reached the end of its range.
    """

    anchor_A: Tensor
    anchor_B: Tensor
    last_A: Tensor
    last_B: Tensor
    update_ratio: float
    scaling: float
    rank_scale: Tensor
    in_weight: bool
    remainder: Tensor | None = None
    remainder_of: torch.dtype | None = None
    past_updates: list[LowRankFactors] | None = field(default_factory=list)
    told_saturated: bool = False
    unseen: tuple[Tensor, ...] = ()
    _equal_at: Stamp | None = field(default=None, repr=False)  # the pair was equal to the copies
    _moved_at: Stamp | None = field(default=None, repr=False)  # it was not
    # Of sharded factors: the pair, since the forward pass sees other tensors; and whole anchors.
    _pair: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _anchors: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    # The pair into which the values after the last step come later, see `expect`.
    _expected: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle: stamps are of the very tensors that stay behind."""
        return {**self.__dict__, "_equal_at": None, "_moved_at": None, "_anchors": None}

    @staticmethod
    def make_rank_scale(update_ratio: float, r: int, like: Tensor, started: bool) -> Tensor:
        wide = wide_dtype(like.dtype)
        on = update_ratio if started else 0.0
        return torch.tensor([1 + on] * r + [-on] * r, dtype=wide, device=like.device)

    # ------------------------------------------------- names of a state, see `delta_to_state`

    def written(self) -> dict[str, Tensor]:
        """The update in a state, without its factors; reads from the device."""
        past = self.past_updates if self.known() else None
        saved = SavedUpdate(self.update_ratio, self.scaling, self.in_weight, past)
        return write_update(saved, self.anchor_A, self.anchor_B)

    @property
    def update(self) -> Tensor:
        return self.written()["update"]

    @property
    def past_A(self) -> Tensor:
        return self.written()["past_A"]

    @property
    def past_B(self) -> Tensor:
        return self.written()["past_B"]

    # ------------------------------------------------------------------------- the update

    def check_remainder(self, name: str, weight: Tensor) -> None:
        """Raise SwapError where the remainder is not of this W, the layer's by ``name``."""
        if self.remainder is not None and self.remainder_of not in (None, weight.dtype):
            given = (
                f"a weight of {weight.dtype}, beside the remainder of one of {self.remainder_of}"
            )
            accepted = "`model.to(dtype)`, which converts both, instead of a new weight"
            raise SwapError(name, given, accepted)

    @property
    def rank(self) -> int:
        """The rank of the one low-rank product that the forward pass needs; see `stack`."""
        added = [p.A.shape[0] for p in self.unwritten_past()]
        return self.rank_scale.shape[0] + sum(added)

    def started(self) -> bool:
        """Whether W has been updated. Reads one value from the device."""
        return bool(self.rank_scale[-1] != 0)

    def factor(self) -> float:
        """lambda s, the factor of the difference of products."""
        return self.update_ratio * self.scaling

    def product(self) -> LowRankFactors:
        """lambda s (B_T A_T - B_k A_k) as two factors of rank 2r, float32 (float64 stays)."""
        self.settle()
        wide, c = self.rank_scale.dtype, self.factor()
        b = torch.cat([c * whole(self.last_B).to(wide), -c * whole(self.anchor_B).to(wide)], dim=1)
        a = torch.cat([whole(self.last_A).to(wide), whole(self.anchor_A).to(wide)])
        return LowRankFactors(b, a, self.in_weight)

    def known(self) -> bool:
        """Whether the update is known as factors; reads from the device."""
        return self.past_updates is not None and not any(map(bool, self.unseen))

    def unwritten(self) -> list[LowRankFactors]:
        """What the forward pass adds to W of the update, as factors; reads from the device."""
        found = self.unwritten_past()
        if not self.in_weight and self.started():
            found.append(self.product())
        return found

    def unwritten_past(self) -> list[LowRankFactors]:
        """The past updates that the forward pass adds."""
        return [p for p in self.past_updates or () if not p.in_weight]

    def all_updates(self) -> list[LowRankFactors] | None:
        """The past updates and the one that goes on; None where they are not known."""
        if not self.known() or self.past_updates is None:
            return None
        return [*self.past_updates, *([self.product()] if self.started() else [])]

    # ------------------------------------------------------------- sharded factors

    def follow_shards(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Remember the parameters of which `stack` will see whole copies."""
        self._pair = (lora_A, lora_B) if is_sharded(lora_A) else None

    def forget_anchors(self) -> None:
        """The anchors were or may be written; `stack` gathers them again."""
        self._anchors = None

    def _whole_anchors(self) -> tuple[Tensor, Tensor]:
        if not is_sharded(self.anchor_A):
            return self.anchor_A, self.anchor_B
        if self._anchors is None:
            self._anchors = whole(self.anchor_A), whole(self.anchor_B)
        return self._anchors

    # ------------------------------------------------------------- a pair that moved

    def expect(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Make what the pair will be at the next use of the update that after the last step.

        DeepSpeed's ZeRO brings the values of a step into the pair after it, and tells nobody.
        """
        self._expected = lora_A, lora_B

    def settle(self) -> None:
        """Take what `expect` left open. Of a pair that ZeRO-3 has partitioned all processes ask."""
        if self._expected is not None:
            with gathered(self._expected):
                self.take_pair(*self._expected)

    @torch.no_grad()
    def set_last(self, last_A: Tensor, last_B: Tensor) -> None:
        """Set A_T and B_T; the pair may be another one."""
        copy_values(self.last_A, last_A)
        copy_values(self.last_B, last_B)
        self._equal_at = self._moved_at = self._expected = None

    def take_pair(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Make the pair as it is now the one after the last step; the anchors stay."""
        self.set_last(lora_A, lora_B)
        self._equal_at = self._stamp(lora_A, lora_B)

    def moved(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """Whether the pair is another than the last step left.

        The device is asked only where something else wrote the pair. What is written through
        ``.data`` is not noticed here.
        """
        self.settle()
        if self._pair is not None:
            lora_A, lora_B = self._pair
        try:
            stamp = self._stamp(lora_A, lora_B)
        except RuntimeError:  # `torch.func` calls the model with tensors that have no memory
            return True
        if stamp == self._equal_at:
            return False
        if stamp == self._moved_at or is_capturing(lora_A.device):
            return True
        return self.differs(lora_A, lora_B)

    def differs(self, lora_A: Tensor, lora_B: Tensor) -> bool:
        """As `moved`, for whatever wrote the pair; reads from the device.

        A pair that ZeRO-3 has partitioned has no values here to compare, and so differs.
        """
        if is_partitioned(lora_A) or is_partitioned(lora_B):
            return True
        self.settle()
        a, b = lora_A.detach(), lora_B.detach()
        same = _equal(a, self.last_A) and _equal(b, self.last_B)
        stamp = self._stamp(lora_A, lora_B)
        self._equal_at, self._moved_at = (stamp, None) if same else (None, stamp)
        return not same

    def _stamp(self, lora_A: Tensor, lora_B: Tensor) -> Stamp:
        pairs = [(local(lora_A), local(self.last_A)), (local(lora_B), local(self.last_B))]
        writes = [0 if p.is_inference() else p._version - c._version for p, c in pairs]
        # ZeRO-3 gathers a parameter for each use, each time somewhere else.
        return Stamp(*writes, *(0 if hasattr(p, "ds_id") else p.data_ptr() for p, _ in pairs))

    @torch.no_grad()
    def end_update(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Keep the update so far as a past one; from now on it goes on from another pair.

        Reads from the device.
        """
        if not self.known():
            self.past_updates = None
            for flag in self.unseen:
                flag.zero_()
        elif self.past_updates is not None and self.started():
            self.past_updates.append(self.product())
            if self.in_weight and len(self.past_updates) > MAX_PAST_UPDATES:
                self.past_updates = None  # too many to save; W itself has them
        self.anchor_A.copy_(lora_A)
        self.anchor_B.copy_(lora_B)
        self.forget_anchors()
        self.take_pair(lora_A, lora_B)

    def begin_from_last(self) -> None:
        """Make the pair after the last step the one before the first that updates W."""
        self.settle()
        self.anchor_A.copy_(self.last_A)
        self.anchor_B.copy_(self.last_B)

    # ----------------------------------------------------------------- the forward pass

    def changes_model(self) -> bool:
        """Whether the model is another than its base and its pairs; reads from the device."""
        return self.started() or self.past_updates is None or bool(self.past_updates)

    def added(self) -> list[LowRankFactors]:
        """As `unwritten`, without a read from the device: zero before the updates have started."""
        self.settle()
        wide, r = self.rank_scale.dtype, self.last_A.shape[0]
        factor = self.rank_scale.clone()
        factor[:r] -= 1
        anchor_A, anchor_B = self._whole_anchors()
        b = torch.cat([whole(self.last_B), anchor_B], dim=1).to(wide) * (factor * self.scaling)
        a = torch.cat([whole(self.last_A), anchor_A]).to(wide)
        return [*self.unwritten_past(), LowRankFactors(b, a, in_weight=False)]

    def stack(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """(A, B, gate, scaling) of the one low-rank product that the forward pass needs.

        ``scaling``: s of the pair now. Where it is that of the update too, and the pair is as the
        last step left it, the rank is the least. A compiled model cannot ask, and adds the update
        beside the pair always.
        """
        if isinstance(scaling, Tensor) or scaling != self.scaling or scaling == 0:
            return self._stack_apart(lora_A, lora_B, scaling)
        # Where derivatives of another kind are taken, `_Stack` would have the first alone.
        if transformed() or torch.compiler.is_compiling() or self.moved(lora_A, lora_B):
            return self._stack_apart(lora_A, lora_B, scaling)
        scale = self.rank_scale
        a, b = _Stack.apply(lora_A, lora_B, *self._whole_anchors(), scale)
        added = self.unwritten_past()
        if added:
            b = torch.cat([b, *(p.B.to(b.dtype) / scaling for p in added)], dim=1)
            a = torch.cat([a, *(p.A.to(a.dtype) for p in added)])
            scale = torch.cat([scale, scale.new_ones(a.shape[0] - scale.shape[0])])
        return a, b, scale, scaling

    def _stack_apart(
        self, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, float]:
        """As `stack`: the pair with its own scale, and the update, a constant, beside it."""
        self.settle()
        r, wide = lora_A.shape[0], self.rank_scale
        anchor_A, anchor_B = self._whole_anchors()
        past = self.unwritten_past()
        constant = whole(self.last_A), anchor_A, *(p.A.to(lora_A.dtype) for p in past)
        a = torch.cat([lora_A, *constant])
        constant = whole(self.last_B), anchor_B, *(p.B.to(lora_B.dtype) for p in past)
        b = torch.cat([lora_B, *constant], dim=1)
        factors = self.scaling * (wide[:r] - 1), self.scaling * wide[r:]
        ones = wide.new_ones(a.shape[0] - 3 * r)
        return a, b, torch.cat([scaling * wide.new_ones(r), *factors, ones]), 1.0


def _equal(a: Tensor, b: Tensor) -> bool:
    if is_sharded(a):  # all processes ask, and have to agree
        return torch.equal(whole(a), whole(b))
    return a.is_meta or (a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))


class _Stack(torch.autograd.Function):
    """[A; A_k] and [B, B_k], with the gradients of A and B as Algorithm 1 has them.

    W is a constant to autograd, so the backward pass divides the factor 1 + lambda out again. That
    is right for first derivatives alone; torch.func has the second ones too.
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
        if torch.is_grad_enabled():
            given = "a backward pass of a factored update that shall be differentiated again"
            raise SwapError("create_graph", given, "torch.func, or w_update='inplace'")
        (rank_scale,) = ctx.saved_tensors
        grad_A = grad_A[: ctx.r] / rank_scale[0].to(grad_A.dtype)
        grad_B = grad_B[:, : ctx.r] / rank_scale[0].to(grad_B.dtype)
        return grad_A, grad_B, None, None, None
