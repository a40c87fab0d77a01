"""`EncodedExamples`: examples as token ids, and batches of them as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .data.examples import Example

IGNORED = -100  # the label of a token without loss, the default of torch's cross_entropy


@dataclass
class EncodedExamples:
    """Token ids with labels, a row for each example, or for each window of a long one.

    Attributes:
        ids: token ids of each row.
        labels: what is to be learnt from each row; the task says what that is.
        pad: the token id that fills up the shorter rows of a batch.
        examples: what the rows were made from.
    """

    ids: list[list[int]]
    labels: list
    pad: int
    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Some rows as tensors: input_ids and attention_mask (rows, tokens), and labels.

        Short rows are padded on the right.
        """
        ids = [self.ids[i] for i in indices]
        batch = {
            "input_ids": pad_rows(ids, self.pad),
            "attention_mask": pad_rows([[1] * len(row) for row in ids], 0),
            **self.targets(indices),
        }
        return {name: t.to(device, non_blocking=True) for name, t in batch.items()}

    def targets(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The entries of a batch beside the model's input; "labels" at least."""
        return {"labels": torch.tensor([self.labels[i] for i in indices])}


def pad_rows(rows: Sequence[list[int]], fill: int) -> Tensor:
    """The rows as one tensor; ``fill`` stands behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])
