"""Metrics that two runs are compared by, example by example.

A run keeps its answers: a few numbers for each held-out example, see `Task.answers`. Every metric
here is a function of sums of terms over the examples. A resample of the examples therefore needs
no more than a product of its counts with the terms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy import ndarray


@dataclass(frozen=True)
class PairedMetric:
    """A metric as a function of sums over examples.

    Attributes:
        terms: makes of answers (examples, columns) the terms (examples, k) that are summed.
        value: makes of sums (..., k) the metric (...).
        constant: makes of answers, and of the metric of the model before training, the answers of
            the best that needs no training: the same answer to every example.
        higher_is_better: whether more is better.
        kept_in: the entry of result.json that has the answers.
    """

    terms: Callable[[ndarray], ndarray]
    value: Callable[[ndarray], ndarray]
    constant: Callable[[ndarray, float | None], ndarray]
    higher_is_better: bool = True
    kept_in: str = "answers"

    def of(self, answers: ndarray) -> float:
        """The metric of all answers of a run."""
        return float(self.value(self.terms(answers).sum(0)))

    def gain(self, value, other):
        """By how much values, numbers or arrays, are better than others; negative if worse."""
        return value - other if self.higher_is_better else other - value


def _mean(sums: ndarray) -> ndarray:
    return sums[..., 0] / sums[..., 1]


def _with_count(column: ndarray) -> ndarray:
    return np.stack([column, np.ones_like(column)], axis=1)


# ------------------------------------- classes: columns label, predicted class, cross entropy


def _majority(answers: ndarray, before: float | None) -> ndarray:
    """The most frequent class for each example, with the loss of the frequencies of the classes."""
    labels, counts = np.unique(answers[:, 0], return_counts=True)
    share = dict(zip(labels, counts / len(answers), strict=True))
    losses = np.array([-np.log(share[label]) for label in answers[:, 0]])
    predicted = np.full(len(answers), labels[counts.argmax()])
    return np.stack([answers[:, 0], predicted, losses], axis=1)


def _confusion(answers: ndarray) -> ndarray:
    """A row for each example with a 1 at its place in the flattened matrix of label x predicted."""
    pairs = answers[:, :2].astype(int)
    classes = pairs.max() + 1
    return np.eye(classes**2)[pairs[:, 0] * classes + pairs[:, 1]]


def _matthews(sums: ndarray) -> ndarray:
    """Matthews' correlation of two classes or more; 0 where it is not defined, as scikit-learn."""
    classes = round(sums.shape[-1] ** 0.5)
    counts = sums.reshape(*sums.shape[:-1], classes, classes)
    labels, predicted, total = counts.sum(-1), counts.sum(-2), sums.sum(-1)
    right = np.trace(counts, axis1=-2, axis2=-1)
    covariance = right * total - (labels * predicted).sum(-1)
    spreads = (total**2 - (labels**2).sum(-1)) * (total**2 - (predicted**2).sum(-1))
    return np.divide(covariance, np.sqrt(spreads), out=np.zeros_like(covariance), where=spreads > 0)


CLASS_METRICS = {
    "accuracy": PairedMetric(
        lambda answers: _with_count((answers[:, 0] == answers[:, 1]).astype(float)),
        _mean, _majority,
    ),
    "matthews": PairedMetric(_confusion, _matthews, _majority),
    "loss": PairedMetric(
        lambda answers: _with_count(answers[:, 2]), _mean, _majority, higher_is_better=False
    ),
}  # fmt: skip

# ------------------------------------------------------- numbers: columns label, prediction


def _mean_number(answers: ndarray, before: float | None) -> ndarray:
    return np.stack([answers[:, 0], np.full(len(answers), answers[:, 0].mean())], axis=1)


def _moments(answers: ndarray) -> ndarray:
    """The terms of Pearson's correlation, about the mean of each column, which is more exact."""
    x, y = (answers - answers.mean(0)).T
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _pearson(sums: ndarray) -> ndarray:
    """Pearson's correlation; 0 where one of the two is constant."""
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spreads = (xx / count - (x / count) ** 2) * (yy / count - (y / count) ** 2)
    covariance = np.asarray(xy / count - x * y / count**2)
    return np.divide(
        covariance, np.sqrt(np.abs(spreads)), out=np.zeros_like(covariance), where=spreads > 1e-24
    )


NUMBER_METRICS = {
    "mse": PairedMetric(
        lambda answers: _with_count((answers[:, 0] - answers[:, 1]) ** 2),
        _mean, _mean_number, higher_is_better=False,
    ),
    "pearson": PairedMetric(_moments, _pearson, _mean_number),
}  # fmt: skip

# ------------------------- text: columns negative log-likelihood, number of tokens of a text


def _untrained(answers: ndarray, before: float | None) -> ndarray:
    """Every token as likely as to the model before training; a text has no constant answer."""
    tokens = answers[:, 1]
    return np.stack([tokens * (np.inf if before is None else before), tokens], axis=1)


TEXT_METRICS = {
    "nll_per_token": PairedMetric(
        lambda answers: answers, _mean, _untrained, higher_is_better=False
    ),
}  # fmt: skip

# -------------------- completions: columns of `metrics.bleu_counts`; where text was generated


def _bleu(sums: ndarray) -> ndarray:
    """BLEU in percent, as sacrebleu has it.

    The first order of n-grams without a match counts as half a match, the next as a quarter.
    Without any match, or any n-gram of some order, BLEU is 0.
    """
    length, reference = sums[..., 0], sums[..., 1]
    right, there = sums[..., 2:6], sums[..., 6:10]
    halvings = np.cumsum(right == 0, axis=-1)
    precisions = np.where(right == 0, 0.5**halvings, right) / np.maximum(there, 1)
    brevity = np.minimum(0, 1 - reference / np.maximum(length, 1))
    found = 100 * np.exp(brevity + np.log(precisions).mean(-1))
    return np.where((right[..., 0] == 0) | (there == 0).any(-1), 0.0, found)


def _nothing(answers: ndarray, before: float | None) -> ndarray:
    """Completions without a word."""
    return answers * (np.arange(answers.shape[1]) == 1)


COMPLETION_METRICS = {
    "bleu": PairedMetric(lambda answers: answers, _bleu, _nothing, kept_in="completion_counts"),
}

# By which a learning rate can be chosen, and all by which runs are compared.
CHOICE_METRICS = CLASS_METRICS | NUMBER_METRICS | TEXT_METRICS
PAIRED_METRICS = CHOICE_METRICS | COMPLETION_METRICS
