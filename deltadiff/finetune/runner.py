"""`ModelRunner`: a model with its task, and how a batch goes through it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batches import EncodedExamples
from .tasks.base import Task


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
            out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = self.task.logits(out)
        smoothing = self.label_smoothing if self.model.training else 0.0
        return self.task.loss(logits, batch["labels"], reduction, smoothing), logits

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
