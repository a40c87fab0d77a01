"""The metrics of text by hand, and what happens if a library is missing."""

import math
import sys

import pytest

from deltadiff.finetune import metrics

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


def test_meteor_needs_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    _, left_out = metrics.score_text(["a b"], [["a b"]])
    assert "Java" in left_out["meteor"]
