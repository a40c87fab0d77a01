"""Comparisons for random calls, which have empty outputs, zeros, NaN and infinities.

The rule is that of `tolerance`. It is about relative errors of finite numbers, so the other values
are compared first: they must be where eager PyTorch has them.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tolerance import Case, Row

KINDS = ("finite", "-inf", "NaN", "inf", "not finite")
# Infinity times a sum has the sign of the sum, or is NaN where that is zero. Rounding decides which
# where the sum is all but zero, as about one in a thousand is where 8 numbers of 8 bits are added.
UNDECIDED = 1 / 200


def compare(
    case: Case,
    output: str,
    ours: Sequence[Tensor],
    eager: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    exact_kind: bool = True,
    **rule,
) -> Row:
    """As `Case.close`, for any values.

    exact_kind: whether NaN must be NaN and infinity the same infinity; else any value that is not
        finite stands for any other.
    """
    names = {**case.names, "output": output}
    if [(t.dtype, t.shape) for t in ours] != [(t.dtype, t.shape) for t in eager]:
        found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in ours)
        return Row(**names, error=math.inf, ok=False, note=f"wrong dtype or shape: {found}")
    kinds = _kinds if exact_kind else _not_finite
    for ours_here, eager_here in zip(ours, eager, strict=True):
        note, wrong = _differences(kinds(ours_here).flatten(), kinds(eager_here).flatten())
        if wrong > UNDECIDED:
            return Row(**names, error=math.inf, ok=False, note=note)
    places = [t.isfinite() & true.isfinite() for t, true in zip(eager, truth, strict=True)]
    ours, eager, truth = (
        [torch.where(place, t, 0) for place, t in zip(places, tensors, strict=True)]
        for tensors in (ours, eager, truth)
    )
    if not any(t.any() for t in truth):  # there is no relative error of nothing
        return Row(**names, ok=not any(t.any() for t in ours), note="a value that should be zero")
    full = [i for i, t in enumerate(truth) if t.numel()]
    return case.close(output, *([ts[i] for i in full] for ts in (ours, eager, truth)), **rule)


def same_bits(case: Case, output: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> Row:
    """As `Case.equal`, also for tensors without elements."""
    if any(t.numel() for t in (*ours, *expected)):
        return case.equal(output, ours, expected)
    same = [t.shape for t in ours] == [t.shape for t in expected]
    return Row(**case.names, output=output, ok=same)


def undisturbed(case: Case, *counts: int) -> Row:
    """Whether nothing changed that is no output; ``counts`` are of elements that did."""
    wrong = sum(counts)
    note = f"{wrong} elements outside of the outputs were written" if wrong else ""
    return Row(**case.names, output="memory beside", ok=not wrong, note=note)


def _kinds(t: Tensor) -> Tensor:
    """The place of each element's kind in KINDS."""
    infinite = torch.where(t.isinf(), t.sign() + 2, 0).to(torch.int8)
    return torch.where(t.isnan(), 2, infinite)


def _not_finite(t: Tensor) -> Tensor:
    return torch.where(t.isfinite(), 0, 4).to(torch.int8)


def _differences(ours: Tensor, eager: Tensor) -> tuple[str, float]:
    """Which kinds there are where others should be, in words, and in which share of places.

    The share is of the places where neither is finite; it is 1 if a finite number is wrong.
    """
    wrong, neither_finite = ours != eager, (ours != 0) & (eager != 0)
    pairs = Counter(zip(ours[wrong].tolist(), eager[wrong].tolist(), strict=True))
    note = f"of {len(ours)} elements " + ", ".join(
        f"{count} are {KINDS[our]} where eager PyTorch has {KINDS[their]}"
        for (our, their), count in pairs.items()
    )
    if (wrong & ~neither_finite).any():
        return note, 1.0
    return note, wrong.sum().item() / max(1, neither_finite.sum().item())
