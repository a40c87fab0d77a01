"""The training loop: its learning rate, batches, losses and evaluation along the way."""

import pytest
from finetune_runs import finetune, train

from deltadiff.finetune.batches import EncodedExamples
from deltadiff.finetune.training import learning_rate

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_learning_rate():
    rates = [learning_rate(1.0, step, 10, warmup=4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate(1.0, 0, 10, warmup=0) == 1


def test_batches_outside_of_training_have_their_own_size(bert, reviews, tmp_path, monkeypatch):
    sizes, batch = [], EncodedExamples.batch

    def noted(data, indices, device):
        sizes.append(len(indices))
        return batch(data, indices, device)

    monkeypatch.setattr(EncodedExamples, "batch", noted)
    words = ["--steps", "2", "--batch-size", "6", "--eval-batch-size", "20"]
    train(bert, reviews, tmp_path / "out", *words)
    assert sizes == [20, 20, 6, 6, 20, 20]  # 40 held out, before and after


def test_the_metrics_along_the_way(bert, reviews, tmp_path):
    words = ["--steps", "9", "--evaluate-every", "4"]
    plain = train(bert, reviews, tmp_path / "a", "--steps", "9")
    result = train(bert, reviews, tmp_path / "b", *words)
    assert [c["step"] for c in result["metric_curve"]] == [4, 8]
    assert all(set(c) == {"step", *result["before"]} for c in result["metric_curve"])
    assert result["loss_curve"] == plain["loss_curve"] and plain["metric_curve"] == []
    assert (tmp_path / "b" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a" / "metrics.png").exists()
    ends = train(bert, reviews, tmp_path / "c", "--steps", "9", "--evaluate-every", "9")
    last = {k: v for k, v in ends["metric_curve"][0].items() if k != "step"}
    assert last == ends["after"]


def test_label_smoothing_is_for_training_only(bert, reviews, tmp_path):
    words = ["--method", "lora", "--steps", "1", "--lr", "1e-6"]
    plain = train(bert, reviews, tmp_path / "a", *words)
    smooth = train(bert, reviews, tmp_path / "b", *words, "--label-smoothing", "0.3")
    assert plain["before"] == smooth["before"]
    assert plain["loss_curve"] != smooth["loss_curve"]


def test_a_loss_that_is_not_finite(bert, reviews, tmp_path, capsys):
    out = tmp_path / "out"
    code = finetune(bert, reviews, "--label-column", "label", "--output", out, "--lr", "1e30")
    assert code == 1
    assert "nan at step " in capsys.readouterr().err
    assert not (out / "result.json").exists()
