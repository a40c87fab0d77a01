"""Comparisons for random calls, which have empty outputs, zeros, NaN and infinities.

The rule is that of `tolerance`. It is about relative errors of finite numbers, so the other values
are compared first: they must be where eager PyTorch has them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..tolerance import Case, Row


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
        wrong = (kinds(ours_here) != kinds(eager_here)).sum().item()
        if wrong:
            note = f"{wrong} of {ours_here.numel()} elements are not as finite as eager PyTorch's"
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
    """0 for finite numbers, 1 and -1 for infinities, 2 for NaN."""
    infinite = torch.where(t.isinf(), t.sign(), 0).to(torch.int8)
    return torch.where(t.isnan(), 2, infinite)


def _not_finite(t: Tensor) -> Tensor:
    return ~t.isfinite()
