"""The text and the model of a run: what is said about them, and what is refused."""

import pytest
import torch
from finetune_runs import finetune, gradients, prepare, runner_of, trained_names

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("model", "label"), [("bert", "label"), ("llama", None)])
def test_activations_are_computed_again_for_the_same_gradients(model, label, request, reviews):
    folder, found, calls = request.getfixturevalue(model), [], []
    for again in (False, True):
        options = {"lora_dropout": 0.2, "label_column": label, "gradient_checkpointing": again}
        inputs, setup = prepare("lora", folder, reviews, **options)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, p in setup.module.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        seen = []
        for name, module in setup.module.named_modules():
            if name.endswith(("query", "q_proj")):
                module.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        runner = runner_of(inputs, setup)
        torch.manual_seed(1)  # for dropout
        runner.loss(inputs.train.batch(list(range(6)), inputs.device))[0].backward()
        found.append(gradients(setup))
        calls.append(len(seen))
    assert calls == [2, 4]  # of two layers
    assert found[0].keys() == found[1].keys() == trained_names(setup.module)
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())
    assert all(gradient.any() for gradient in found[1].values())


def test_a_model_that_cannot_compute_activations_again(
    bert, reviews, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(transformers.BertPreTrainedModel, "supports_gradient_checkpointing", False)
    words = ["--label-column", "label", "--gradient-checkpointing", "--output", tmp_path / "out"]
    assert finetune(bert, reviews, *words) == 2
    assert "gradient_checkpointing: got BertForSequence" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
