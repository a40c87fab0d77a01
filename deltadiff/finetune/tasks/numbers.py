"""The answer is a number: a head with one output, and the squared error."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import mse_loss

from ...errors import ArgumentError
from ..data.examples import Example
from ..metrics import Scores, add_metrics
from ..paired_metrics import NUMBER_METRICS
from .base import Task
from .labelled import encode_labelled


@dataclass(frozen=True)
class NumberTask(Task):
    """Regression: the labels are numbers."""

    name = "numbers"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    outputs = 1
    loss_axis = "squared error"
    metric_titles = {"mse": "MSE", "pearson": "Pearson", "spearman": "Spearman"}
    headline = "squared error"
    paired_metrics = NUMBER_METRICS

    @classmethod
    def found_in(cls, examples, settings):
        return cls() if settings.regression else None

    def configure(self, config):
        config.problem_type = "regression"

    def check(self, settings):
        super().check(settings)
        if settings.label_smoothing:
            raise ArgumentError("label_smoothing", settings.label_smoothing, "0 for regression")

    def encode(self, examples, tokenizer, max_length):
        numbers = [_number(e) for e in examples]
        return encode_labelled(examples, numbers, tokenizer, max_length)

    def loss(self, logits, labels, reduction="mean", label_smoothing=0.0):
        """``logits`` (rows, 1), ``labels`` (rows,) float32. Numbers are not smoothed."""
        return mse_loss(logits.squeeze(-1), labels, reduction=reduction)

    def prediction_rows(self, losses, logits, batch):
        return logits

    def score(self, rows, data) -> Scores:
        """Mean squared error, Pearson's and Spearman's correlation."""
        numbers = rows.squeeze(-1)
        found = {"mse": mse_loss(numbers, torch.tensor(data.labels)).item()}
        more = {"pearson": _pearson, "spearman": _spearman}
        return add_metrics(found, more, numbers.double().tolist(), data.labels)

    def answers(self, rows, data):
        """The label and the prediction."""
        return [[y, round(row[0], 6)] for y, row in zip(data.labels, rows.tolist(), strict=True)]

    def predictions(self, rows, data):
        table = [["text", "label", "predicted"]]
        for example, row in zip(data.examples, rows.tolist(), strict=True):
            table.append([example.text, example.label, *row])
        return table


def _number(example: Example) -> float:
    try:
        number = float(example.label)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        given = f"{example.label!r} in {example.place}"
        raise ArgumentError("label_column", given, "a finite number in each row, for regression")
    return number


def _pearson(predicted: list[float], labels: list[float]) -> float:
    from scipy.stats import pearsonr

    return pearsonr(predicted, labels).statistic if _vary(predicted, labels) else math.nan


def _spearman(predicted: list[float], labels: list[float]) -> float:
    from scipy.stats import spearmanr

    return spearmanr(predicted, labels).statistic if _vary(predicted, labels) else math.nan


def _vary(*columns: list[float]) -> bool:
    """A constant has no correlation."""
    return all(len(set(column)) > 1 for column in columns)
