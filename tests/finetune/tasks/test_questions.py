"""`deltadiff finetune` on questions whose answers are spans of a text."""

import csv
import json
import random
import sys

import pytest
import torch
from finetune_runs import squad, train

from deltadiff.__main__ import main
from deltadiff.finetune.data.examples import Example, split_examples
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.models import load_model
from deltadiff.finetune.runner import ModelRunner
from deltadiff.finetune.tasks.spans import SpanTask, best_answers

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    """Questions about a film or its plot, answered by a word of the text; one in five has none."""
    from tiny_models import DULL, FUN

    source, found = random.Random(0), []
    for i in range(300):
        film, plot = source.choice(FUN + DULL), source.choice(FUN + DULL)
        text = f"a story and a cast the film is {film} with very {plot} plot"
        if i % 5 == 0:
            text, answer = f"a {film} story and the very {plot} cast", []
        elif i % 2:
            answer = [(film, text.index(f" {film} with") + 1)]
        else:
            answer = [(plot, text.index(f" {plot} plot") + 1)]
        prompt = "film is" if i % 2 else "very plot"
        found.append(Example(text, prompt=prompt, answers=tuple(answer)))
    path = tmp_path_factory.mktemp("data") / "questions.json"
    path.write_text(squad(*found))
    return str(path)


def train_questions(model, data, output, *words) -> dict:
    return train(model, data, output, "--start-step", 10, *words, labels=False)


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("lora-peft", "delta-lora", "full")]


@pytest.mark.parametrize("method", ["lora", "diffora", *LONG])
def test_it_learns_to_find_answers(method, bert, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    if method == "lora-peft":
        pytest.importorskip("peft")
    result = train_questions(bert, questions, tmp_path / "out", "--method", method)
    before, after = result["before"], result["after"]
    assert before["squad_f1"] < 50 and after["squad_f1"] > 95 and after["squad_em"] > 95
    assert after["loss"] < before["loss"] / 4
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["examples"]["heldout"] and {r["predicted"] for r in rows} > {""}
    right = [row["predicted"] == row["answers"] for row in rows]
    assert 100 * sum(right) / len(right) == pytest.approx(after["squad_em"], abs=1e-3)


def test_the_merged_model_gives_the_same_answers(bert, questions, tmp_path):
    train_questions(bert, questions, tmp_path / "out", "--method", "delta-lora", "--steps", 40)
    words = ["merge", bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]
    assert main(words) == 0
    merged = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    _, heldout = split_examples(read_examples(questions), 0.1, seed=0)
    task = SpanTask()
    data = task.encode(heldout, load_model(bert, task).tokenizer, 128)
    runner = ModelRunner(merged, task, torch.device("cpu"), torch.float32)
    found = best_answers(runner.predict(data, 8), data)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        assert found == [row["predicted"] for row in csv.DictReader(file)]


def test_a_decoder_learns_too(llama, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    result = train_questions(llama, questions, tmp_path / "out", "--method", "lora")
    assert result["after"]["squad_f1"] > 80 > 50 > result["before"]["squad_f1"]


def test_windows_of_a_text_that_is_cut(bert, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    words = ["--method", "full", "--lr", 0.003, "--max-length", 10, "--doc-stride", 4]
    result = train_questions(bert, questions, tmp_path / "out", *words)
    assert result["examples"]["train"] > 400 and result["after"]["squad_f1"] > 90


def test_without_torchmetrics(bert, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    result = train_questions(bert, questions, tmp_path / "out", "--method", "lora", "--steps", 1)
    assert set(result["after"]) == {"loss"}
    assert set(result["metrics_left_out"]) == {"squad_em", "squad_f1"}


def test_a_preset_of_table_7(bert, questions, tmp_path):
    words = ["--preset", "diffora/squad-v2-0.16", "--steps", 3, "--search-rounds", 2]
    result = train_questions(bert, questions, tmp_path / "out", *words)
    assert (result["settings"]["r"], result["settings"]["share_r"]) == (4, 2)
    assert "search" in result and result["after"]["loss"] > 0


def test_methods_are_compared(bert, questions, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    words = ["--methods", "lora", "delta-lora", "--seeds", "1", "--steps", "2", "--device", "cpu"]
    assert main(["compare", bert, questions, *words, "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "exact match" in table and "SQuAD F1" in table
    (path,) = (tmp_path / "out").glob("compare-*.json")
    metrics = {(r["method"], r["metric"]) for r in json.loads(path.read_text())}
    names = ("loss", "squad_em", "squad_f1")
    assert metrics == {(method, name) for method in ("lora", "delta-lora") for name in names}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--generate", "2"], "generate: got 2; accepted: 0 for text with labels or answers"),
        (["--max-length", "4"], "max_length: got 4; accepted: at least 67"),
        (["--doc-stride", "-1"], "doc_stride: got -1"),
        (["--heldout", "{text}"], "heldout: got text without answers"),
    ],
)
def test_bad_input(words, told, bert, questions, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the film\n")
    words = [word.format(text=tmp_path / "a.txt") for word in words]
    assert main(["finetune", bert, questions, "--output", str(tmp_path / "out"), *words]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
