"""Metrics as functions of sums over examples: the same as those of the libraries."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from deltadiff.finetune.batches import EncodedExamples
from deltadiff.finetune.metrics import bleu_counts, score_text
from deltadiff.finetune.paired_metrics import CHOICE_METRICS, PAIRED_METRICS
from deltadiff.finetune.tasks.choose import METRIC_TITLES, TASKS
from deltadiff.finetune.tasks.classes import ClassTask
from deltadiff.finetune.tasks.numbers import NumberTask
from deltadiff.finetune.tasks.text import TextTask

pytest.importorskip("sklearn")
pytest.importorskip("scipy")


def _data(labels) -> EncodedExamples:
    return EncodedExamples([[1]] * len(labels), labels, 0, [None] * len(labels))


def _cases(randn):
    classes = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    twice = [label % 2 for label in classes]
    numbers = randn(60).tolist()
    tokens = torch.arange(1, 61, dtype=torch.float32)
    yield ClassTask(("a", "b")), randn(60, 2), _data(twice)
    yield ClassTask(("a", "b", "c")), randn(60, 3), _data(classes)
    yield NumberTask(), randn(60, 1), _data(numbers)
    yield TextTask(), torch.stack([randn(60).abs() * tokens, tokens], dim=1), _data([])


def test_they_are_those_of_the_task(randn):
    seen = set()
    for task, rows, data in _cases(randn):
        answers = np.array(task.answers(rows, data), dtype=float)
        scores, _ = task.score(rows, data)
        for name, metric in task.paired_metrics.items():
            assert metric.of(answers) == pytest.approx(scores[name], rel=1e-5), (task, name)
            seen.add(name)
    assert seen == set(CHOICE_METRICS) and set(PAIRED_METRICS) <= set(METRIC_TITLES)


def test_bleu_is_that_of_sacrebleu():
    pytest.importorskip("sacrebleu")
    references = [
        ["A fine old pub by the river .", "The pub by the river is old ."], ["It is cheap ."],
        ["A coffee shop in the city centre called Blue Spice ."],
    ]  # fmt: skip
    for found in (
        ["The old pub by the river is fine .", "it is cheap .", "A coffee shop called Blue Spice"],
        ["The pub", "cheap", "Spice shop"],  # too short, and of some lengths there is no match
        ["x y z v", "w", "u"],
        ["The x river y old z", "it", "A x centre y Blue"],  # words match, longer n-grams do not
        ["", "", ""],
    ):
        counts = np.array(bleu_counts(found, references), dtype=float)
        score = score_text(found, references)[0]["bleu"]
        assert PAIRED_METRICS["bleu"].of(counts) == pytest.approx(score, abs=1e-9), found
    constant = PAIRED_METRICS["bleu"].constant(counts, None)
    assert PAIRED_METRICS["bleu"].of(constant) == 0


def test_a_resample_is_the_metric_of_the_examples_that_it_repeats(randn):
    counts = np.random.default_rng(0).multinomial(60, [1 / 60] * 60)
    for task, rows, data in _cases(randn):
        answers = np.array(task.answers(rows, data), dtype=float)
        repeated = answers.repeat(counts, axis=0)
        for name, metric in task.paired_metrics.items():
            value = float(metric.value(counts @ metric.terms(answers)))
            assert value == pytest.approx(metric.of(repeated), rel=1e-9), (task, name)


def test_the_best_constant_answer(randn):
    labels = [0, 1, 1, 1]
    wrong = ClassTask(("a", "b")).answers(torch.tensor([[0.0, 9.0]] * 4), _data(labels))
    constant = PAIRED_METRICS["accuracy"].constant(np.array(wrong, dtype=float), None)
    assert constant[:, 1].tolist() == [1, 1, 1, 1]
    assert PAIRED_METRICS["accuracy"].of(constant) == 0.75
    assert PAIRED_METRICS["matthews"].of(constant) == 0
    frequencies = torch.tensor([[0.25, 0.75]]).log().expand(4, 2)
    expected = cross_entropy(frequencies, torch.tensor(labels)).item()
    assert PAIRED_METRICS["loss"].of(constant) == pytest.approx(expected)

    numbers = np.array([[1.0, 5.0], [3.0, 5.0]])
    constant = PAIRED_METRICS["mse"].constant(numbers, None)
    assert PAIRED_METRICS["mse"].of(constant) == 1.0  # the variance
    assert PAIRED_METRICS["pearson"].of(constant) == 0

    text = np.array([[9.0, 2.0], [1.0, 6.0]])
    constant = PAIRED_METRICS["nll_per_token"].constant(text, 2.5)
    assert PAIRED_METRICS["nll_per_token"].of(constant) == 2.5


def test_better_is_above_zero():
    assert PAIRED_METRICS["accuracy"].gain(0.9, 0.8) > 0 > PAIRED_METRICS["loss"].gain(0.9, 0.8)
    lower = {"loss", "mse", "nll_per_token"}
    assert {n for n, m in PAIRED_METRICS.items() if not m.higher_is_better} == lower


def test_the_tasks_whose_runs_can_be_compared():
    by_task = {task.name: set(task.paired_metrics) for task in TASKS}
    assert by_task.pop("spans") == set()
    assert all(by_task.values())
