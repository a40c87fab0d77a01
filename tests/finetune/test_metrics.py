"""The metrics against values worked out by hand, and what happens where a library is missing."""

import math
import sys

import pytest
import torch

from deltadiff.finetune import metrics
from deltadiff.finetune.data import Encoded

# 8 texts: 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0]
LABELS = [1, 1, 1, 0, 1, 1, 0, 0]


def classes(predicted, labels, count=2):
    rows = torch.nn.functional.one_hot(torch.tensor(predicted), count).float()
    return metrics.score(rows, Encoded([[0]] * len(labels), labels, 0))


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


def test_numbers():
    pytest.importorskip("scipy")
    found, left_out = metrics.score(
        torch.tensor([[1.0], [2.0], [4.0]]), Encoded([[0]] * 3, [1.0, 3.0, 2.0], 0)
    )
    assert found["mse"] == pytest.approx((0 + 1 + 4) / 3)
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): covariance 1, variances 42/9 and 2.
    assert found["pearson"] == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    assert found["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8))
    assert left_out == {}


def test_a_constant_has_no_correlation():
    pytest.importorskip("scipy")
    found, left_out = metrics.score(torch.ones(3, 1), Encoded([[0]] * 3, [1.0, 3.0, 2.0], 0))
    assert list(found) == ["mse"]
    assert left_out["pearson"] == left_out["spearman"] == "not defined for these values"


def test_tokens():
    rows = torch.tensor([[2.0, 1.0], [4.0, 3.0]])  # (negative log-likelihood, tokens)
    found, _ = metrics.score(rows, Encoded([[0], [0]], [[0], [0]], 0))
    assert found == pytest.approx({"nll_per_token": 1.5, "perplexity": math.exp(1.5)})


# ------------------------------------------------------------------------------- text

REFERENCES = [["the cat sat on the mat", "a cat was on the mat"], ["dogs bark at night"]]
FOUND = ["the cat sat on a mat", "dogs bark at night"]


def test_bleu():
    pytest.importorskip("sacrebleu")
    found, _ = metrics.score_text(FOUND, REFERENCES)
    # n-grams of both texts that a reference has: 10 of 10 ("a" stands in the second one), 6 of 8,
    # 4 of 6 and 2 of 4; as long as the references, so no brevity penalty.
    precisions = [10 / 10, 6 / 8, 4 / 6, 2 / 4]
    assert found["bleu"] == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_rouge_l_takes_the_nearest_reference():
    pytest.importorskip("rouge_score")
    found, _ = metrics.score_text(FOUND, REFERENCES)
    # Longest common subsequence 5 of 6 and 6 words, and 4 of 4.
    assert found["rouge_l"] == pytest.approx(100 * (5 / 6 + 1) / 2)


def test_nist():
    pytest.importorskip("nltk")
    found, _ = metrics.score_text(["a b c d e"], [["a b c d e"]])
    # Each of 5 words tells log2(5); after its predecessor the next word is certain (0 bits).
    assert found["nist"] == pytest.approx(math.log2(5))


def test_cider():
    pytest.importorskip("pycocoevalcap")
    same, _ = metrics.score_text(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert same["cider"] == pytest.approx(10)  # a cosine of 1 for each of 4 n-grams, times 10
    other, _ = metrics.score_text(["e f g h", "a b c d"], [["a b c d"], ["e f g h"]])
    assert other["cider"] == 0


def test_meteor():
    pytest.importorskip("pycocoevalcap")
    found, left_out = metrics.score_text(["dogs bark at night"], [["dogs bark at night"]])
    assert found.get("meteor") == pytest.approx(100) or "Java" in left_out["meteor"]


def test_words():
    assert metrics.words("It's 5-star, REALLY!") == ["it", "'", "s", "5", "-", "star", ",", *[
        "really", "!"
    ]]  # fmt: skip


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("sacrebleu", "bleu"),
        ("nltk.translate.nist_score", "nist"),
        ("rouge_score.rouge_scorer", "rouge_l"),
        ("pycocoevalcap.cider.cider", "cider"),
        ("pycocoevalcap.meteor.meteor", "meteor"),
    ],
)
def test_a_library_that_is_missing_leaves_its_metric_out(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    found, left_out = metrics.score_text(["a b c d e f"], [["a b c d e f"]])
    assert name not in found
    assert package in left_out[name]


def test_without_scikit_learn_accuracy_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    found, left_out = classes(PREDICTED, LABELS)
    assert set(found) == {"accuracy", "loss"} and set(left_out) == {"matthews", "f1"}


def test_meteor_needs_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    _, left_out = metrics.score_text(["a b"], [["a b"]])
    assert "Java" in left_out["meteor"]
