"""`EncodedExamples`: examples as token ids, and batches of them as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .data.examples import Example
from .data.skipped import Skipped

IGNORED = -100  # the label of a token without loss, the default of torch's cross_entropy


@dataclass
class EncodedExamples:
    """Token ids with labels, a row for each example, or for each window of a long one.

    Attributes:
        ids: token ids of each row.
        labels: what is to be learnt from each row; the task says what that is.
        pad: the token id that fills up the shorter rows of a batch.
        examples: what the rows were made from.
        segments: for each row, which of two sentences each token belongs to (``token_type_ids``);
            None for models that do not tell them apart.
        skipped: examples of which nothing was left to learn.
        cut: how many rows have fewer tokens than their text.
    """

    ids: list[list[int]]
    labels: list
    pad: int
    examples: Sequence[Example]
    segments: list[list[int]] | None = field(default=None, kw_only=True)
    skipped: Skipped = field(default_factory=Skipped, kw_only=True)
    cut: int = field(default=0, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Some rows as tensors: input_ids and attention_mask (rows, tokens), and labels.

        Where the rows have segments, token_type_ids too. Short rows are padded on the right.
        """
        ids = [self.ids[i] for i in indices]
        batch = {
            "input_ids": pad_rows(ids, self.pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            **self.targets(indices),
        }
        if self.segments is not None:
            batch["token_type_ids"] = pad_rows([self.segments[i] for i in indices], 0)
        return {name: t.to(device, non_blocking=True) for name, t in batch.items()}

    def targets(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The entries of a batch beside the model's input; "labels" at least."""
        return {"labels": torch.tensor([self.labels[i] for i in indices])}

    def counted(self, indices: Sequence[int]) -> int:
        """How many terms the mean loss of these rows is over."""
        return len(indices)


def pad_rows(rows: Sequence[list[int]], fill: int) -> Tensor:
    """The rows as one tensor; ``fill`` stands behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
