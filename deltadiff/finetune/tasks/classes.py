"""The answer is one of some classes: a new linear head, and cross entropy."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import tensor
from torch.nn.functional import cross_entropy

from ...errors import ArgumentError
from ..data.examples import Example
from ..metrics import Scores, add_metrics
from ..paired_metrics import CLASS_METRICS
from .base import Task
from .labelled import encode_labelled

MOST_LABELS = 1000


@dataclass(frozen=True)
class ClassTask(Task):
    """Classification: ``labels`` are the classes, in the order of the head's outputs."""

    labels: tuple[str, ...]

    name = "classes"
    auto_class = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    metric_titles = {
        "accuracy": "accuracy", "loss": "loss", "matthews": "Matthews", "f1": "F1",
    }  # fmt: skip
    headline = "accuracy"
    paired_metrics = CLASS_METRICS

    @classmethod
    def found_in(cls, examples, settings):
        labels = () if settings.regression else find_labels(examples)
        return cls(labels) if labels else None

    @property
    def outputs(self):
        return len(self.labels)

    def configure(self, config):
        config.problem_type = "single_label_classification"
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {label: i for i, label in enumerate(self.labels)}

    def encode(self, examples, tokenizer, max_length):
        index = {label: i for i, label in enumerate(self.labels)}
        for e in examples:
            if e.label not in index:
                classes = f"{len(index)} classes of the training text"
                accepted = f"the {classes}: {', '.join(self.labels[:5])}"
                raise ArgumentError("label", f"{e.label!r} in {e.place}", accepted)
        labels = [index[e.label] for e in examples]
        return encode_labelled(examples, labels, tokenizer, max_length)

    def loss(self, logits, labels, reduction="mean", label_smoothing=0.0):
        """``logits`` (rows, classes), ``labels`` (rows,) int64."""
        return cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)

    def prediction_rows(self, losses, logits, batch):
        return logits

    def score(self, rows, data) -> Scores:
        """Accuracy, loss, Matthews' correlation, and F1.

        F1 is that of the second of two classes; of more classes it is the mean of all.
        """
        labels, predicted = tensor(data.labels), rows.argmax(1)
        accuracy = (predicted == labels).double().mean().item()
        found = {"accuracy": accuracy, "loss": cross_entropy(rows, labels).item()}
        binary = rows.shape[1] == 2
        more = {"matthews": _matthews, "f1": lambda p, y: _f1(p, y, binary)}
        return add_metrics(found, more, predicted.tolist(), data.labels)

    def answers(self, rows, data):
        """The places of the label and of the predicted class, and the cross entropy."""
        losses = cross_entropy(rows, tensor(data.labels), reduction="none").tolist()
        places = zip(data.labels, rows.argmax(1).tolist(), losses, strict=True)
        return [[label, predicted, round(loss, 6)] for label, predicted, loss in places]

    def predictions(self, rows, data):
        table = [["text", "label", "predicted", *(f"logit {name}" for name in self.labels)]]
        for example, row in zip(data.examples, rows.tolist(), strict=True):
            table.append([example.text, example.label, self.labels[row.index(max(row))], *row])
        return table


def find_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """The classes in the order of their names; empty if the examples have none.

    Raises:
        ArgumentError: there is one class only, or so many that the column cannot hold labels.
    """
    labels = tuple(sorted({e.label for e in examples if e.label is not None}))
    if labels and not 2 <= len(labels) <= MOST_LABELS:
        given = f"a column with {len(labels)} different values"
        raise ArgumentError("label_column", given, f"2 to {MOST_LABELS} classes")
    return labels


def _matthews(predicted: list[int], labels: list[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predicted)


def _f1(predicted: list[int], labels: list[int], binary: bool) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, average="binary" if binary else "macro", zero_division=0)
