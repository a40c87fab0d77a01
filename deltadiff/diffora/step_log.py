"""`StepLog`: the losses of steps that the host does not wait for, and whether they were finite."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..loop import LOSS_SYNC_INTERVAL

Place = tuple[int, int]  # round, and inner steps in it


@dataclass(frozen=True)
class Step:
    """A step whose loss has been read.

    Attributes:
        before, after: the search's place before and after the step.
        loss: the loss that the step was computed from.
        failed: whether the loss or a gradient was inf or NaN, so that the step was not taken.
    """

    before: Place
    after: Place
    loss: float
    failed: bool


class StepLog:
    """Keeps the losses of the last steps on the device and reads them together.

    Attributes:
        failed: float32, 0-dim, on the device: not 0 from the first step on whose loss or gradient
            is not finite. As ``found_inf`` of an optimizer it makes that step and all later ones do
            nothing, until `read`.
        read_every: after how many steps the losses are `due`; 1 on the CPU, which never waits.
    """

    def __init__(self, device: torch.device):
        self.failed = torch.zeros((), dtype=torch.float32, device=device)
        self.read_every = 1 if device.type == "cpu" else LOSS_SYNC_INTERVAL
        self._unread: list[tuple[Place, Place, Tensor]] = []

    @property
    def all_read(self) -> bool:
        """Whether the host knows the losses of all steps, so that it need not wait for them."""
        return not self._unread

    @property
    def due(self) -> bool:
        """Whether it is time to `read`."""
        return len(self._unread) >= self.read_every

    def judge(self, loss: Tensor, grads: list[Tensor]) -> None:
        """Set `failed` where the loss (0-dim) or an entry of a gradient is not finite."""
        norms = torch._foreach_norm(grads, float("inf")) if grads else ()
        # There are two dtypes with a 16-bit head, and two devices where FSDP offloads.
        numbers = [t.to(self.failed.device, torch.float32) for t in (loss, *norms)]
        failed = ~torch.stack(numbers).isfinite().all()
        self.failed.copy_(torch.maximum(self.failed, failed.float()))

    def note(self, before: Place, after: Place, loss: Tensor) -> None:
        """Keep the loss of a step that was judged."""
        self._unread.append((before, after, torch.stack([loss.float(), self.failed])))

    def read(self) -> list[Step]:
        """The steps since the last call, up to the first that failed; waits for the device.

        The steps after a failed one were not taken either and are forgotten.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return []
        steps = []
        values = torch.stack([noted for *_, noted in unread]).tolist()
        for (before, after, _), (loss, failed) in zip(unread, values, strict=True):
            steps.append(Step(before, after, loss, bool(failed)))
            if failed:
                self.failed.zero_()
                break
        return steps

    def clear(self) -> None:
        """Forget all steps, also one that failed."""
        self._unread.clear()
        self.failed.zero_()
