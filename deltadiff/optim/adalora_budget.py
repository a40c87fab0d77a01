"""How many triplets AdaLoRA keeps in which step, and which ones."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checks import check_int
from ..errors import ArgumentError


@dataclass(frozen=True)
class Schedule:
    """The budget b(t) in step t = 1, ..., T: all triplets, then fewer by a cubic, then the target.

    The cubic is the one in the authors' code, which starts at all triplets and ends at the target.
    The paper prints t - t_i - t_f where the code has t - t_i; the printed form does neither.

    Attributes:
        total_step: T.
        target_r: the average rank of a layer at the end.
        tinit: t_i, the number of first steps, which keep all triplets.
        tfinal: t_f, the number of last steps, which no longer change the choice.
        deltaT: steps from one choice to the next; between them all triplets are trained.

    Raises:
        ArgumentTypeError, ArgumentError: an attribute that is no int or too small, or a total_step
            that leaves no steps between tinit and tfinal.
    """

    total_step: int
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1

    def __post_init__(self) -> None:
        least = {"total_step": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}
        for name, value in asdict(self).items():
            check_int(name, value, least[name])
        if self.tinit >= self.last_choice:
            given = f"{self.total_step} with tinit {self.tinit} and tfinal {self.tfinal}"
            raise ArgumentError("total_step", given, "more steps than tinit + tfinal")

    @property
    def last_choice(self) -> int:
        """The last step that measures importance and chooses: T - t_f."""
        return self.total_step - self.tfinal

    def budget(self, t: int, first: int, target: int) -> int:
        """b(t) on the way from ``first`` triplets to ``target``, rounded down."""
        if t <= self.tinit:
            return first
        left, span = max(0, self.last_choice - t), self.last_choice - self.tinit
        return target + (first - target) * left**3 // span**3

    def chooses(self, t: int) -> bool:
        """Whether step t masks the triplets beyond the budget."""
        return t >= self.last_choice or (t > self.tinit and t % self.deltaT == 0)


def largest(scores: Tensor, budget: Tensor) -> Tensor:
    """Mask (n,) of the ``budget`` largest of ``scores`` (n,); of equal ones the first are taken.

    ``budget`` is an integer on the device, which the host does not read.
    """
    order = scores.argsort(descending=True, stable=True)
    places = torch.arange(order.numel(), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places) < budget
