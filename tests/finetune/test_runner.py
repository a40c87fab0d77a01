"""`ModelRunner`: many small batches count as one large one."""

import pytest
import torch
from finetune_runs import finetune, gradients, prepare, runner_of, train

from deltadiff.finetune import training

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("model", "more"),
    [("bert", {}), ("llama", {"label_column": None}), ("llama", {"method": "adalora"})],
)
def test_small_batches_have_the_gradient_of_a_large_one(model, more, request, reviews):
    folder = request.getfixturevalue(model)
    more = {"method": "lora", "label_column": None if model == "llama" else "label"} | more
    inputs, setup = prepare(more.pop("method"), folder, reviews, **more)
    with torch.no_grad():
        for name, p in setup.module.named_parameters():
            if "lora_B" in name:
                p.normal_()
    runner, scaler = runner_of(inputs, setup), torch.amp.GradScaler("cpu", enabled=False)
    setup.module.eval()  # BERT's own dropout would draw other masks
    indices = list(range(12))
    losses, found = [], []
    for most in (12, 5):
        loss = training._backward(runner, setup, scaler, inputs.train, indices, most)
        losses.append(loss.item())
        found.append(gradients(setup))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    loss = runner.mean_loss(inputs.train, indices, 5)
    assert loss.item() == pytest.approx(losses[0], rel=1e-6)


def test_a_batch_counts_by_its_tokens(llama, reviews):
    inputs, setup = prepare("lora", llama, reviews, label_column=None)
    runner = runner_of(inputs, setup)
    shares = [share for _, share in runner.parts(inputs.train, list(range(10)), 4)]
    tokens = [sum(len(inputs.train.ids[i]) - 1 for i in part) for part in (range(4), range(4, 8))]
    assert sum(shares) == pytest.approx(1) and len(shares) == 3
    assert shares[0] / shares[1] == tokens[0] / tokens[1] and tokens[0] != tokens[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_parts_that_are_computed_again_have_the_same_dropout(device, bert, reviews):
    inputs, setup = prepare("lora", bert, reviews, lora_dropout=0.3, device=device)
    with torch.no_grad():
        for name, p in setup.module.named_parameters():
            if "lora_B" in name:
                p.normal_()
    runner, scaler = runner_of(inputs, setup), torch.amp.GradScaler(device, enabled=False)
    indices = list(range(12))
    torch.manual_seed(0)
    runner.mean_loss(inputs.train, indices, 5).backward()
    again = gradients(setup)
    torch.manual_seed(0)
    training._backward(runner, setup, scaler, inputs.train, indices, 5)
    for name, gradient in gradients(setup).items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "delta-lora", "diffora"])
def test_a_run_of_small_batches_ends_like_one_of_large_ones(method, llama, reviews, tmp_path):
    words = ["--method", method, "--steps", "6", "--lr", "1e-3"]
    words += ["--search-rounds", "2", "--inner-steps", "2"] if method == "diffora" else []
    large = train(llama, reviews, tmp_path / "a", *words, "--batch-size", "12", labels=False)
    small = ["--batch-size", "4", "--gradient-accumulation", "3", "--eval-batch-size", "12"]
    small = train(llama, reviews, tmp_path / "b", *words, *small, labels=False)
    assert small["loss_curve"] == pytest.approx(large["loss_curve"], rel=1e-5)
    assert small["after"] == pytest.approx(large["after"], rel=1e-5)
    if method == "diffora":
        for losses in ("training_loss", "validation_loss"):
            assert small["search"][losses] == pytest.approx(large["search"][losses], rel=1e-5)


def test_an_epoch_has_as_many_steps_as_large_batches(bert, reviews, tmp_path):
    words = ["--epochs", "0.5", "--batch-size", "10", "--gradient-accumulation", "4"]
    words += ["--label-column", "label", "--output", tmp_path / "out", "--device", "cpu"]
    assert finetune(bert, reviews, *words) == 0
    assert '"steps": 5,' in (tmp_path / "out" / "settings.json").read_text()  # half of 360 texts
