"""Classes: labels, encoding and metrics by hand."""

import math
import sys

import pytest
import torch
from character_tokenizer import CharacterTokenizer

from deltadiff.errors import ArgumentError
from deltadiff.finetune.batches import EncodedExamples
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.tasks.classes import ClassTask, find_labels


@pytest.mark.parametrize("count", [1, 1001])
def test_a_column_that_is_no_label(count):
    with pytest.raises(ArgumentError, match="label_column"):
        find_labels([Example("x", str(i)) for i in range(count)])


def test_a_label_of_another_file():
    with pytest.raises(ArgumentError, match="2 classes of the training text: bad, good"):
        ClassTask(("bad", "good")).encode([Example("x", "new")], CharacterTokenizer(), 8)


# 8 texts: 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0]

LABELS = [1, 1, 1, 0, 1, 1, 0, 0]


def classes(predicted, labels, count=2):
    """The scores of a model that is sure of these classes."""
    rows = torch.nn.functional.one_hot(torch.tensor(predicted), count).float()
    task = ClassTask(tuple(map(str, range(count))))
    return task.score(rows, EncodedExamples([[0]] * len(labels), labels, 0, ()))


def test_classes():
    pytest.importorskip("sklearn")
    found, left_out = classes(PREDICTED, LABELS)
    assert found["accuracy"] == 5 / 8
    right, wrong = -math.log(math.e / (math.e + 1)), -math.log(1 / (math.e + 1))
    assert found["loss"] == pytest.approx((5 * right + 3 * wrong) / 8)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    product = (3 + 1) * (3 + 2) * (2 + 1) * (2 + 2)
    assert found["matthews"] == pytest.approx((3 * 2 - 1 * 2) / math.sqrt(product))
    assert left_out == {}


def test_f1_of_several_classes_is_the_mean_of_each():
    pytest.importorskip("sklearn")
    found, _ = classes([0, 0, 1, 2], [0, 1, 1, 2], count=3)
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_without_scikit_learn_accuracy_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    found, left_out = classes(PREDICTED, LABELS)
    assert set(found) == {"accuracy", "loss"} and set(left_out) == {"matthews", "f1"}
