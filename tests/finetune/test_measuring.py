"""The metrics of a run are those of the files it saved, and a failure in a part costs that part."""

import json

import pytest
import torch
from finetune_runs import finetune

from deltadiff import load_adapter
from deltadiff.finetune import measuring, run
from deltadiff.finetune.inputs import load_inputs
from deltadiff.finetune.runner import ModelRunner
from deltadiff.finetune.settings import Settings

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:rounding=", "ignore:W of .* layers"),
]

FIXED = ["--device", "cpu", "--lr", "0.003", "--steps", "6", "--start-step", "0", "--r", "4"]
SEARCH = ["--search-rounds", "2", "--inner-steps", "1"]


def train(model, data, output, words, code=0, labels=True) -> dict:
    columns = ["--label-column", "label"] if labels else []
    assert finetune(model, data, "--output", output, *columns, *FIXED, *words) == code
    return json.loads((output / "result.json").read_text())


def measured_again(output, result) -> tuple[dict, list[list[object]]]:
    """(metrics, predictions) of the saved adapter on a base model that was loaded anew."""
    inputs = load_inputs(Settings(**result["settings"]))
    load_adapter(inputs.model.module, output / "adapter")
    runner = ModelRunner(inputs.model.module, inputs.model.task, inputs.device, inputs.dtype)
    rows = runner.predict(inputs.heldout, 32)
    return runner.task.score(rows, inputs.heldout)[0], runner.task.predictions(rows, inputs.heldout)


@pytest.mark.parametrize(
    "words",
    [
        "--method lora",
        "--method lora --adapter-format peft --use-rslora",
        "--method delta-lora",
        "--method delta-lora --adapter-format peft --dtype bfloat16",
        "--method delta-lora --dtype bfloat16 --rounding stochastic",
        "--method delta-lora --dtype bfloat16 --rounding nearest",
        "--method delta-lora --dtype float16",
        "--method delta-lora-factored --dtype bfloat16",
        "--method adalora --adapter-format peft",
        "--method dylora",
        "--method diffora",
        "--method diffora-random --adapter-format peft",
    ],
)
def test_what_was_measured_is_what_was_saved(words, bert, reviews, tmp_path):
    output = tmp_path / "out"
    result = train(bert, reviews, output, [*words.split(), *SEARCH])
    metrics, predictions = measured_again(output, result)
    assert metrics == result["after"]
    lines = (output / "predictions.csv").read_text().splitlines()
    assert lines == [",".join(map(str, line)) for line in predictions]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_rounded_w_is_another_model_and_this_is_said(rounding, bert, reviews, tmp_path, capsys):
    words = ["--dtype", "bfloat16", "--rounding", rounding]
    result = train(bert, reviews, tmp_path / "out", words)
    error = result["weight_update"]["error"]
    assert error > 0.02
    assert f"W was rounded in each step and is {error:.1%} of the update" in capsys.readouterr().out


def test_the_whole_model_is_saved_bit_by_bit(bert, reviews, tmp_path):
    result = train(bert, reviews, tmp_path / "out", ["--method", "full"])
    again = Settings(**result["settings"] | {"model": str(tmp_path / "out" / "model")})
    inputs = load_inputs(again)
    runner = ModelRunner(inputs.model.module, inputs.model.task, inputs.device, inputs.dtype)
    rows = runner.predict(inputs.heldout, 32)
    assert runner.task.score(rows, inputs.heldout)[0] == result["after"]


# ------------------------------------------------------------------------- failures


WEIGHTS = ("similarity", "weight_update")


def broken(*args, **more):
    raise RuntimeError("first\nsecond")


@pytest.mark.parametrize(
    ("place", "name", "part", "lost"),
    [
        (measuring, "load_model", "loading the base model again", {"after", *WEIGHTS}),
        (measuring, "weight_update", "weight_update", {"weight_update"}),
        (measuring, "similarity", "similarity", {"similarity"}),
        (measuring, "write_csv", "predictions.csv", set()),
        (run, "place_model", "reading back what was saved", {"after"}),
        (run, "plot_loss", "loss.png", set()),
        (run, "plot_similarity", "similarity.png", set()),
        (ModelRunner, "predict", "metrics", {"after"}),
    ],
)  # fmt: skip
def test_a_failure_after_the_training_costs_its_part(
    place, name, part, lost, bert, reviews, tmp_path, monkeypatch, capsys
):
    whole = train(bert, reviews, tmp_path / "whole", [])
    saved = run._write_trained

    def then_break(*args):
        folder = saved(*args)
        monkeypatch.setattr(place, name, broken)
        return folder

    monkeypatch.setattr(run, "_write_trained", then_break)
    result = train(bert, reviews, tmp_path / "out", [], code=1)
    told = capsys.readouterr()
    assert result["failed"] == {part: "RuntimeError: first second"}
    assert f"{part} failed: RuntimeError: first second" in told.out and "Traceback" not in told.err
    for entry in ("after", *WEIGHTS, "loss_curve"):
        if entry in lost:
            assert not result[entry]
        else:
            assert result[entry] == whole[entry]
    adapters = [next((tmp_path / n / "adapter").glob("*.safetensors")) for n in ("whole", "out")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_generation_that_fails(llama, reviews, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "complete", broken)
    words = ["--generate", "2", "--max-new-tokens", "2"]
    result = train(llama, reviews, tmp_path / "out", words, code=1, labels=False)
    assert result["failed"] == {"generation": "RuntimeError: first second"}
    assert result["after"] and not (tmp_path / "out" / "completions.csv").exists()


def test_metrics_that_are_no_numbers(bert, reviews, tmp_path, monkeypatch):
    real = ModelRunner.predict
    monkeypatch.setattr(ModelRunner, "predict", lambda *args: real(*args) * torch.inf)
    result = train(bert, reviews, tmp_path / "out", ["--evaluate-every", "3"])
    assert "loss" not in result["after"] and result["metrics_left_out"]["loss"].startswith("it is ")
    assert "loss" not in result["before"] and len(result["metric_curve"]) == 2


def test_a_dollar_in_a_name_and_a_backend_of_a_notebook(bert, reviews, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    data = tmp_path / "$x_$ {a^b$.csv"
    with open(reviews) as file:
        data.write_text(file.read())
    result = train(bert, data, tmp_path / "out", [])
    assert result["failed"] == {} and (tmp_path / "out" / "loss.png").exists()
