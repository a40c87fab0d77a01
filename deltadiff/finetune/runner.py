"""`ModelRunner`: a model with its task, and how a batch goes through it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .batches import EncodedExamples
from .tasks.base import Task

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what a model gets of a batch


@dataclass(frozen=True)
class ModelRunner:
    """A model with its task, its device, and the dtype that its products run in.

    ``label_smoothing`` applies in training only.
    """

    model: nn.Module
    task: Task
    device: torch.device
    dtype: torch.dtype
    label_smoothing: float = 0.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, Tensor]:
        """(loss, logits) of a batch, see `Task.loss`."""
        with self.autocast():
            out = self.model(**{name: batch[name] for name in INPUTS if name in batch})
        logits = self.task.logits(out)
        smoothing = self.label_smoothing if self.model.training else 0.0
        return self.task.loss(logits, batch["labels"], reduction, smoothing), logits

    def parts(
        self, data: EncodedExamples, indices: Sequence[int], most: int
    ) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Some rows in batches of at most ``most``, each with its share of the mean loss.

        The share is that of what has a loss (see `EncodedExamples.counted`): a batch of short
        answers counts less than one of long answers. The losses times the shares add up to the loss
        of one batch of all rows.
        """
        counted = data.counted(indices)
        for start in range(0, len(indices), most):
            part = indices[start : start + most]
            yield data.batch(part, self.device), data.counted(part) / counted

    def mean_loss(self, data: EncodedExamples, indices: Sequence[int], most: int) -> Tensor:
        """The loss of some rows as one differentiable number.

        More than ``most`` rows go through the model in parts, of which each is computed again in
        the backward pass, so that the activations of one part are in memory at a time.
        """
        if len(indices) <= most:
            return self.loss(data.batch(indices, self.device))[0]
        total = torch.zeros((), device=self.device)
        for batch, share in self.parts(data, indices, most):
            # Tensors among the arguments tell `checkpoint` whose random state to restore.
            total = total + share * checkpoint(
                self._loss_of, *batch, *batch.values(), use_reentrant=False
            )
        return total

    def _loss_of(self, *batch: str | Tensor) -> Tensor:
        """The loss of a batch, given as its names and then its tensors."""
        half = len(batch) // 2
        return self.loss(dict(zip(batch[:half], batch[half:], strict=True)))[0]

    @torch.no_grad()
    def predict(self, data: EncodedExamples, batch_size: int) -> Tensor:
        """What the task keeps of each row of ``data`` (see `Task.prediction_rows`), on the CPU."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))  # for little padding
        rows = []
        for start in range(0, len(order), batch_size):
            batch = data.batch(order[start : start + batch_size], self.device)
            losses, logits = self.loss(batch, reduction="none")
            rows.append(self.task.prediction_rows(losses, logits, batch).cpu())
        self.model.train(was_training)
        return torch.cat(rows)[torch.tensor(order).argsort()]
