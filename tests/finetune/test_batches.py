"""Batches: which examples they hold, and how they are padded."""

import torch

from deltadiff.finetune.batches import EncodedExamples
from deltadiff.loop import batch_indices


def test_batches_go_through_every_example_once_an_epoch():
    seen = [i for step in range(21) for i in batch_indices(14, 4, seed=5, step=step)]
    epochs = [seen[i : i + 14] for i in range(0, 84, 14)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert batch_indices(14, 4, seed=6, step=0) != batch_indices(14, 4, seed=5, step=0)


def test_class_labels_make_a_batch():
    data = EncodedExamples([[5, 6, 7], [8]], [1, 0], pad=9, examples=())
    batch = data.batch([1, 0], torch.device("cpu"))
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]
