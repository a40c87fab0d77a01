"""A whole run on conversations: the model learns to answer, and where an answer ends."""

import csv
import json

import pytest
from finetune_runs import finetune, stop_at, train

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
from chat_tokenizers import CHATML, MARKED, save_chat_model  # noqa: E402

from deltadiff.__main__ import main  # noqa: E402
from deltadiff.finetune import training  # noqa: E402
from deltadiff.finetune.chat import PLAIN_TEMPLATE  # noqa: E402

pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = {"a": "great", "b": "dull", "c": "the film", "d": "a plot"}


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> str:
    """ShareGPT's form of one question and answer each; two of them cannot be used."""
    rows = [[("human", q), ("gpt", a)] for q, a in QUESTIONS.items()]
    rows += [[("human", "x"), ("gpt", "")], [("human", "a" * 200), ("gpt", "b")]]
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    lines = [[{"from": f, "value": v} for f, v in row] for row in rows]
    path.write_text("\n".join(json.dumps({"conversations": line}) for line in lines))
    return str(path)


WORDS = ["--method", "lora", "--batch-size", "4", "--generate", "-1", "--max-new-tokens", "20"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_model_learns_to_answer(template, talks, tmp_path, capsys):
    model = save_chat_model(tmp_path / "model", template)
    words = [*WORDS, "--heldout", talks, "--method", "full", "--lr", "0.003", "--steps", "120"]
    result = train(model, talks, tmp_path / "out", *words, labels=False)
    assert result["after"]["nll_per_token"] < 0.1
    with (tmp_path / "out" / "completions.csv").open(newline="") as file:
        found = [(row["prompt"], row["completion"]) for row in csv.DictReader(file)]
    assert found == [(f"user: {q}", a) for q, a in QUESTIONS.items()]
    assert result["skipped"] == {
        "with an empty message": 2, "with nothing to learn in its first 128 tokens": 2
    }  # fmt: skip
    assert result["examples"] == {"train": 4, "heldout": 4}
    told = capsys.readouterr().out
    assert f"skipped: 2 with an empty message (first: {talks}, line 5), 2 with nothing" in told


def test_the_template_goes_with_the_adapter(talks, tmp_path):
    model = save_chat_model(tmp_path / "model", CHATML)
    words = [*WORDS, "--heldout", talks, "--steps", "2", "--chat-template", "plain"]
    train(model, talks, tmp_path / "out", *words, labels=False)
    adapter = tmp_path / "out" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    assert main(["merge", model, str(adapter), str(tmp_path / "merged")]) == 0
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == PLAIN_TEMPLATE


@pytest.mark.parametrize(
    ("template", "words", "told"),
    [
        (None, [], "the model's tokenizer has no template; accepted: --chat-template plain"),
        (CHATML, ["--chat-template", "no-such-file"], "chat_template: got no-such-file"),
        (CHATML, ["--max-length", "9"], "max_length: got 9; skipped: 5 with nothing to learn"),
        (CHATML, ["--prompt-column", "conversations"], "prompt_column: got 'conversations' beside"),
        (CHATML, ["--label-column", "conversations"], "beside the conversation in"),
    ],
)
def test_conversations_that_cannot_be_used(template, words, told, talks, tmp_path, capsys):
    model = save_chat_model(tmp_path / "model", template)
    words = [*words, "--heldout", talks, "--output", tmp_path / "out"]
    assert finetune(model, talks, *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_template_without_conversations(llama, reviews, tmp_path, capsys):
    words = ["--chat-template", "plain", "--output", tmp_path / "out"]
    assert finetune(llama, reviews, *words) == 2
    assert "chat_template: got plain for text without conversations" in capsys.readouterr().err


def test_a_run_on_conversations_is_resumed(talks, tmp_path, monkeypatch):
    model = save_chat_model(tmp_path / "model")
    words = ["--heldout", talks, "--chat-template", "plain", "--steps", "6", "--batch-size", "2"]
    whole = train(model, talks, tmp_path / "whole", *words, labels=False)
    fixed = ["--lr", "0.01", "--start-step", "3", "--device", "cpu", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, training, 4)
        assert finetune(model, talks, *words, *fixed) == 130
    assert finetune("--resume", tmp_path / "out") == 0
    parts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert parts["after"] == whole["after"] and parts["skipped"] == whole["skipped"]
