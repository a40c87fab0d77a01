"""The network of equation 3 with and without a selection: its loss beside the theorems' bounds.

    f(x) = 1/sqrt(m) sum_r a_r relu((w0 + Gamma w_r)^T x)        w_r ~ N(0, I), a_r = +-1

Gradient descent with small steps trains the w_r; a and w0 stay. Theorem 2 bounds the squared error
at time t (steps times their size) by exp(-lambda t) times that at the start, with the smallest
eigenvalue lambda of the Gram matrix of definition 1 with Gamma; theorem 1 is the same without.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..gram import Comparison, compare_grams


@dataclass(frozen=True)
class Problem:
    """Points, labels, a selection and frozen weights of one random draw."""

    x: Tensor  # (n, d), of norm 1
    y: Tensor  # (n,), at most 1 in size
    selection: Tensor  # (d,)
    w0: Tensor  # (d,)


# How much of the inputs a selection keeps, by name: each gives Gamma (d,) for points (n, d).
Selections = dict[str, Callable[[Tensor, torch.Generator], Tensor]]


def _random_part(share: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    def select(x: Tensor, generator: torch.Generator) -> Tensor:
        d = x.shape[1]
        kept = torch.zeros(d)
        kept[torch.randperm(d, generator=generator)[: round(share * d)]] = 1
        return kept

    return select


def _largest_half(x: Tensor, generator: torch.Generator) -> Tensor:
    """The half of the inputs that vary most over the points."""
    kept = torch.zeros(x.shape[1])
    kept[x.square().sum(0).argsort(descending=True)[: x.shape[1] // 2]] = 1
    return kept


SELECTIONS: Selections = {
    "a random half": _random_part(0.5),
    "all but one": lambda x, g: _random_part(1 - 1 / x.shape[1])(x, g),
    "the largest half": _largest_half,
}
DATA = ("any direction", "positive inputs")
FROZEN = ("w0 = 0", "w0 random", "w0 along the points")


@dataclass(frozen=True)
class Setting:
    """A kind of random draws: how points, selection and frozen weights are made."""

    data: str
    selection: str
    frozen: str

    def draw(self, n: int, d: int, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        x = x.abs() if self.data == "positive inputs" else x
        x /= x.norm(dim=1, keepdim=True)
        y = 2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1
        selection = SELECTIONS[self.selection](x, generator).double()
        w0 = torch.zeros(d, dtype=torch.float64)
        if self.frozen == "w0 random":
            w0 = torch.randn(d, generator=generator, dtype=torch.float64)
        elif self.frozen == "w0 along the points":
            w0 = x.sum(0)
        return Problem(x, y, selection, w0)


SETTINGS = tuple(
    Setting(data, selection, frozen)
    for frozen in FROZEN
    for data in DATA
    for selection in SELECTIONS
)


@dataclass(frozen=True)
class Course:
    """The squared error of a network in training, over that at its start.

    Attributes:
        times: t of each entry.
        errors: the squared error at each of them, 1 at t = 0.
        rate: lambda of the bound exp(-lambda t).
        kernel_rate: the smallest eigenvalue of the kernel that gradient descent on the w_r has at
            the start; with a selection its entries are (Gamma^T x_i)^T (Gamma^T x_j) I_ij, where
            definition 1 has x_i^T x_j.
    """

    times: list[float]
    errors: list[float]
    rate: float
    kernel_rate: float

    @property
    def bounded(self) -> bool:
        """Whether the error is at most exp(-rate t) at all times."""
        bounds = (math.exp(-self.rate * t) for t in self.times)
        return all(e <= b * (1 + 1e-9) for e, b in zip(self.errors, bounds, strict=True))


def train(
    problem: Problem,
    selected: bool,
    rate: float,
    indicators: Tensor,
    *,
    hidden: int,
    steps: int,
    size: float,
    seed: int,
) -> Course:
    """Train the network for ``steps`` steps of ``size``, with Gamma or without it."""
    x, y = problem.x, problem.y
    z = x * problem.selection if selected else x
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(hidden, x.shape[1], generator=generator, dtype=torch.float64)
    a = 2.0 * torch.randint(2, (hidden,), generator=generator, dtype=torch.float64) - 1
    offset = x @ problem.w0
    errors = []
    for _ in range(steps + 1):
        before = w @ z.T + offset  # (hidden, n)
        residual = (a @ before.clamp(min=0)) / math.sqrt(hidden) - y
        errors.append(residual.square().sum().item())
        on = (before > 0).double() * a[:, None]
        w -= size / math.sqrt(hidden) * ((on * residual) @ z)
    kernel_rate = torch.linalg.eigvalsh((z @ z.T) * indicators)[0].item()
    times = [size * t for t in range(steps + 1)]
    return Course(times, [e / errors[0] for e in errors], rate, kernel_rate)


@dataclass
class Counts:
    """How often something was so, over the draws of a setting."""

    draws: int = 0
    holds: int = 0  # the condition of theorem 2
    open: int = 0  # the error of the draws of w leaves the condition open
    larger: int = 0  # lambda with the selection is at least that without
    larger_without: int = 0  # ... in draws where the condition fails
    fails: int = 0
    bounded: int = 0  # the loss with the selection stays below theorem 2's bound
    plain_bounded: int = 0  # the loss without it stays below theorem 1's
    ratios: list[float] = field(default_factory=list)  # of the two lambdas

    def add(self, found: Comparison, selected: Course, plain: Course) -> None:
        larger = found.selected.smallest >= found.plain.smallest
        self.draws += 1
        self.holds += found.holds is True
        self.open += found.holds is None
        self.fails += found.holds is False
        self.larger += larger
        self.larger_without += larger and found.holds is False
        self.bounded += selected.bounded
        self.plain_bounded += plain.bounded
        self.ratios.append(found.selected.smallest / found.plain.smallest)


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    points: int = 8
    inputs: int = 12
    hidden: int = 1024
    steps: int = 200
    step_size: float = 0.1
    draws: int = 100
    samples: int = 20_000


def run_one(setting: Setting, size: Size, seed: int) -> tuple[Comparison, Course, Course]:
    """One draw: the Gram matrices, and the courses of training with the selection and without."""
    problem = setting.draw(size.points, size.inputs, seed)
    found = compare_grams(
        problem.x, problem.selection, problem.w0, samples=size.samples, seed=seed
    )  # fmt: skip
    selected, plain = (
        train(
            problem, which, g.smallest, g.indicators,
            hidden=size.hidden, steps=size.steps, size=size.step_size, seed=seed,
        )
        for which, g in ((True, found.selected), (False, found.plain))
    )  # fmt: skip
    return found, selected, plain


def count(setting: Setting, size: Size, seed: int) -> Counts:
    """Over ``size.draws`` draws, the first of which has this seed."""
    counts = Counts()
    for i in range(size.draws):
        counts.add(*run_one(setting, size, seed + i))
    return counts
