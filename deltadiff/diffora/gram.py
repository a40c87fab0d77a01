"""`gram`: the Gram matrices of DiffoRA's section 3, and the condition of its theorem 2.

For points x_i, a frozen vector w0 and a selection Gamma, definition 1 has, over w ~ N(0, I),

    H_ij = x_i^T x_j I_ij        I_ij = P[(w0 + Gamma w)^T x_i >= 0 and (w0 + Gamma w)^T x_j >= 0]

(eq. 4), and the same without Gamma (eq. 5). The smallest eigenvalue of H is the rate of theorems 1
and 2. Theorem 2 compares the two rates where I with Gamma, minus I without, is positive
semi-definite.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_int
from ..errors import ArgumentError, ArgumentTypeError

CHUNK = 1 << 22  # numbers that are drawn at a time
SURE = 3.0  # standard errors that a sign must be away from 0 to be called known


@dataclass(frozen=True)
class Gram:
    """A Gram matrix of definition 1.

    Attributes:
        indicators: I, (n, n).
        matrix: H, (n, n).
        smallest: the smallest eigenvalue of H.
        standard_error: the largest of an entry of I; 0 where I is known in closed form.
    """

    indicators: Tensor
    matrix: Tensor
    smallest: float
    standard_error: float


@dataclass(frozen=True)
class Comparison:
    """The Gram matrices with and without a selection, and the condition of theorem 2.

    Attributes:
        selected, plain: with Gamma (eq. 4) and without it (eq. 5).
        difference: the smallest eigenvalue of the difference of their ``indicators``.
        error: how far that may be from its expectation: 0 in closed form, else three standard
            errors (Frobenius norm, which bounds what an eigenvalue moves).
    """

    selected: Gram
    plain: Gram
    difference: float
    error: float

    @property
    def holds(self) -> bool | None:
        """Whether the difference is positive semi-definite; None where the error leaves it open."""
        rounding = 1e-12 * len(self.plain.matrix)
        if 0 < abs(self.difference) <= self.error:
            return None
        return self.difference >= -rounding


def gram(
    x: Tensor,
    selection: Tensor | None = None,
    w0: Tensor | None = None,
    *,
    samples: int = 100_000,
    seed: int = 0,
) -> Gram:
    """The Gram matrix of definition 1, with a selection (eq. 4) or without one (eq. 5).

    Where ``w0`` is None or 0 it is exact: I_ij = (pi - t) / 2 pi with the angle t between
    Gamma^T x_i and Gamma^T x_j. Else I is estimated from ``samples`` draws of w.

    Args:
        x: (n, d), a point in each row, of any floating dtype; computed in float64.
        selection: Gamma, (d,) for a diagonal one or (d, d), of entries 0 and 1; None is I.
        w0: (d,), the frozen weights; None is 0.
        samples: draws of w, where they are needed.
        seed: of these draws.

    Raises:
        ArgumentTypeError, ArgumentError: a tensor of another shape, or with other entries.
    """
    (found,) = _grams(*_checked(x, [selection], w0, samples), samples, seed)[0]
    return found


def compare_grams(
    x: Tensor,
    selection: Tensor,
    w0: Tensor | None = None,
    *,
    samples: int = 100_000,
    seed: int = 0,
) -> Comparison:
    """The Gram matrices with and without a selection, and whether theorem 2's condition holds.

    Where w has to be drawn, both are estimated from the same draws. Arguments and errors are those
    of `gram`.

    For w0 = 0 the condition can hold only where the selection keeps all angles: unless
    Gamma^T x_i = 0, both matrices of indicators have 1/2 on their diagonals, and a positive
    semi-definite matrix with a zero diagonal is 0. Else it needs w0^T x_i >= 0 for each point whose
    norm Gamma lowers.
    """
    grams, difference, error = _grams(*_checked(x, [selection, None], w0, samples), samples, seed)
    selected, plain = grams
    return Comparison(selected, plain, torch.linalg.eigvalsh(difference)[0].item(), error)


def _checked(
    x: Tensor, selections: list[Tensor | None], w0: Tensor | None, samples: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, Gamma^T x of each selection, and w0^T x, in float64."""
    check_int("samples", samples, 2)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ArgumentTypeError("x", type(x).__name__, "a floating-point tensor")
    if x.dim() != 2 or not x.numel() or not x.isfinite().all():
        raise ArgumentError("x", f"shape {tuple(x.shape)}", "finite points (n, d)")
    points, d = x.double(), x.shape[1]
    projected = []
    for selection in selections:
        if selection is None:
            projected.append(points)
            continue
        if not isinstance(selection, Tensor) or tuple(selection.shape) not in ((d,), (d, d)):
            given = tuple(selection.shape) if isinstance(selection, Tensor) else repr(selection)
            raise ArgumentError("selection", given, f"a tensor ({d},) or ({d}, {d})")
        if not ((selection == 0) | (selection == 1)).all():
            raise ArgumentError("selection", "other entries", "entries 0 and 1")
        chosen = selection.double()
        projected.append(points * chosen if selection.dim() == 1 else points @ chosen)
    if w0 is None:
        return points, projected, points.new_zeros(len(points))
    if not isinstance(w0, Tensor) or tuple(w0.shape) != (d,) or not w0.isfinite().all():
        given = tuple(w0.shape) if isinstance(w0, Tensor) else repr(w0)
        raise ArgumentError("w0", given, f"a finite tensor ({d},)")
    return points, projected, points @ w0.double()


def _grams(
    x: Tensor, projected: list[Tensor], offset: Tensor, samples: int, seed: int
) -> tuple[list[Gram], Tensor, float]:
    """The matrix of each selection; the difference of the first and last I, and its error."""
    if not offset.any():
        indicators = [_closed_form(z) for z in projected]
        errors, error = [0.0] * len(projected), 0.0
    else:
        indicators, both = _sampled(projected, offset, samples, seed)
        errors = [(p * (1 - p) / samples).sqrt().max().item() for p in indicators]
        mean = indicators[0] - indicators[-1]
        variance = indicators[0] + indicators[-1] - 2 * both - mean.square()
        error = SURE * (variance.clamp(min=0) / samples).sum().sqrt().item()
    grams = []
    for p, standard_error in zip(indicators, errors, strict=True):
        matrix = (x @ x.T) * p
        smallest = torch.linalg.eigvalsh(matrix)[0].item()
        grams.append(Gram(p, matrix, smallest, standard_error))
    return grams, indicators[0] - indicators[-1], error


def _closed_form(z: Tensor) -> Tensor:
    """P[w^T z_i >= 0 and w^T z_j >= 0] for each pair of rows; a row of zeros is always >= 0."""
    norms = z.norm(dim=1)
    unit = z / norms.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
    cosine = (unit @ unit.T).clamp(-1, 1)
    cosine.fill_diagonal_(1)
    both = (math.pi - cosine.arccos()) / (2 * math.pi)
    zero = norms == 0
    both = torch.where(zero[:, None] | zero[None, :], 0.5, both)
    return torch.where(zero[:, None] & zero[None, :], 1.0, both)


def _sampled(
    projected: list[Tensor], offset: Tensor, samples: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Estimates of I for each selection, and of how often both the first's and the last's hold."""
    n, d = projected[0].shape
    generator = torch.Generator().manual_seed(seed)
    sums = [offset.new_zeros(n, n) for _ in projected]
    both = offset.new_zeros(n, n)
    done = 0
    while done < samples:
        count = min(samples - done, max(1, CHUNK // max(n, d)))
        w = torch.randn(count, d, generator=generator, dtype=torch.float64)
        seen = [(w @ z.T + offset >= 0).double() for z in projected]
        for total, s in zip(sums, seen, strict=True):
            total += s.T @ s
        joint = seen[0] * seen[-1]
        both += joint.T @ joint
        done += count
    return [total / samples for total in sums], both / samples
