"""Numbers: labels, metrics by hand, and a regression that learns."""

import math
import random

import pytest
import torch
from character_tokenizer import CharacterTokenizer
from finetune_runs import finetune, train

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError
from deltadiff.finetune.batches import EncodedExamples
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.tasks.numbers import NumberTask

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
THREE = EncodedExamples([[0]] * 3, [1.0, 3.0, 2.0], 0, ())


def test_numbers_to_predict():
    examples = [Example("x", "2.5"), Example("y", "-1")]
    data = NumberTask().encode(examples, CharacterTokenizer(), 9)
    assert data.labels == [2.5, -1.0]
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [2.5, -1.0]


@pytest.mark.parametrize("label", ["many", "nan", None])
def test_a_label_that_is_no_number(label):
    with pytest.raises(ArgumentError, match="label_column"):
        NumberTask().encode([Example("x", label)], CharacterTokenizer(), 9)


def test_numbers():
    pytest.importorskip("scipy")
    found, left_out = NumberTask().score(torch.tensor([[1.0], [2.0], [4.0]]), THREE)
    assert found["mse"] == pytest.approx((0 + 1 + 4) / 3)
    # Deviations (-4/3, -1/3, 5/3) and (-1, 1, 0): covariance 1, variances 42/9 and 2.
    assert found["pearson"] == pytest.approx(1 / math.sqrt(42 / 9 * 2))
    assert found["spearman"] == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8))
    assert left_out == {}


def test_a_constant_has_no_correlation():
    pytest.importorskip("scipy")
    found, left_out = NumberTask().score(torch.ones(3, 1), THREE)
    assert list(found) == ["mse"]
    assert left_out["pearson"] == left_out["spearman"] == "not defined for these values"


def test_numbers_are_not_smoothed(bert, praise, tmp_path, capsys):
    words = ["--label-column", "label", "--regression", "--label-smoothing", "0.1"]
    assert finetune(bert, praise, *words, "--output", tmp_path / "out") == 2
    assert "label_smoothing: got 0.1; accepted: 0 for regression" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def praise(tmp_path_factory) -> str:
    """A TSV file of texts, labelled with half the number of words of praise in each."""
    from tiny_models import FUN, NEUTRAL  # not above: pytest registers the plugin first

    draw = random.Random(1)
    lines = ["text\tlabel"]
    for _ in range(300):
        count = draw.randint(0, 3)
        words = draw.choices(NEUTRAL, k=4) + draw.choices(FUN, k=count)
        draw.shuffle(words)
        lines.append(f"{' '.join(words)}\t{count / 2}")
    path = tmp_path_factory.mktemp("data") / "praise.tsv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_regression_learns(method, bert, praise, tmp_path):
    pytest.importorskip("scipy")
    result = train(bert, praise, tmp_path / "out", "--regression", "--method", method)
    assert set(result["after"]) == {"mse", "pearson", "spearman"}
    assert result["after"]["mse"] < (0.5 if method == "lora" else 1) * result["before"]["mse"]
    assert result["after"]["pearson"] > (0.8 if method == "lora" else 0.1)
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "text,label,predicted" and len(lines) == 31
    saved = [float(line.rpartition(",")[2]) for line in lines[1:]]
    labels = [float(line.split(",")[1]) for line in lines[1:]]
    mse = sum((a - b) ** 2 for a, b in zip(saved, labels, strict=True)) / 30
    assert mse == pytest.approx(result["after"]["mse"], rel=1e-4)


def test_a_regression_is_merged(bert, praise, tmp_path):
    train(bert, praise, tmp_path / "out", "--regression", "--method", "lora", "--steps", "3")
    words = ["merge", bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]
    assert main(words) == 0
