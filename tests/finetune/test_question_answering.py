"""Answers that are spans of a text: windows, loss and scores by hand, and `deltadiff finetune`."""

import csv
import json
import random
import sys

import pytest
import torch

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError
from deltadiff.finetune.data import Example, read_examples, split_examples
from deltadiff.finetune.metrics import score
from deltadiff.finetune.models import Model, load_model
from deltadiff.finetune.question_answering import NONE, Windows, answers, best, encode, loss
from deltadiff.finetune.training import ModelRunner, predict

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def squad(*questions: Example) -> str:
    """JSON as SQuAD has it, a paragraph for each question."""
    paragraphs = [
        {
            "context": e.text,
            "qas": [
                {
                    "id": str(i),
                    "question": e.prompt,
                    "answers": [{"text": text, "answer_start": at} for text, at in e.answers],
                }
            ],
        }
        for i, e in enumerate(questions)
    ]
    return json.dumps({"version": "1.1", "data": [{"title": "films", "paragraphs": paragraphs}]})


def asked(prompt: str, text: str, *found: str) -> Example:
    places = tuple((answer, text.index(answer)) for answer in found)
    return Example(text, prompt=prompt, group=text, answers=places)


# ------------------------------------------------------------------------- reading


def test_squads_files_are_read(tmp_path):
    questions = [
        asked("what is it", "the film is great", "great", "is great"),
        asked("who", "nobody knows"),
    ]
    empty = asked("who", " ")
    for name, format in (("train-v2.0.json", None), ("a.txt", "squad")):
        (tmp_path / name).write_text(squad(empty, *questions))
        assert read_examples(str(tmp_path / name), format=format) == questions


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (squad(Example("a film", prompt="q", answers=(("film", 1),))), "'film', which is not at 1"),
        (squad(Example("a film", prompt="q", answers=(("", 0),))), "'', which is not at 0"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', "KeyError"),
        ('{"data": 3}', "TypeError"),
        ("[1]", "TypeError"),
        ("{", "Expecting"),
        ('{"data": []}', "which holds no examples"),
    ],
)
def test_files_that_are_not_squads(text, told, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArgumentError, match="data: got") as caught:
        read_examples(str(tmp_path / "a.json"))
    assert told in str(caught.value)


# ------------------------------------------------------------------------- windows


@pytest.fixture(scope="module")
def model(bert) -> Model:
    return Model(None, transformers.AutoTokenizer.from_pretrained(bert), "span", (), ("head",))


def test_windows(model):
    text = "the film is a story with plot and cast very great dull"
    examples = [asked("the film", text, "plot and"), asked("is", "a film", "film", "a")]
    data = encode(examples, model, max_length=8, doc_stride=2)
    words = text.split()
    pieces = [words[0:6], words[4:10], words[8:12], ["a", "film"]]
    assert data.owners == [0, 0, 0, 1] and len(data) == 4
    for i, (owner, piece) in enumerate(zip(data.owners, pieces, strict=True)):
        places = data.offsets[i].tolist()
        shown = [examples[owner].text[a:b] for a, b in places if b]
        assert shown == piece and len(places) == len(data.ids[i])
    # "plot and" are words 6 and 7: whole in the second window, behind the question's two tokens.
    assert data.labels == [(0, 0), (4, 5), (0, 0), (2, 2)]
    batch = data.batch([3, 1], torch.device("cpu"))
    assert batch["context"].tolist() == [
        [False, True, True] + [False] * 5,
        [False] * 2 + [True] * 6,
    ]
    assert batch["labels"].tolist() == [[2, 2], [4, 5]]


def test_an_answer_that_no_window_holds_whole(model):
    data = encode([asked("is", "a story with plot and cast", "with plot")], model, 4, 0)
    assert data.labels == [(0, 0), (0, 0)] and data.owners == [0, 0]


def test_texts_that_leave_no_room(model):
    examples = [asked("the film is", "a story", "story")]
    assert len(encode(examples, model, 6, 2)) == 1
    with pytest.raises(ArgumentError, match="max_length: got 5; accepted: at least 6"):
        encode(examples, model, 5, 2)


def test_tokenizers_without_offsets(model):
    class Slow:
        is_fast = False

    with pytest.raises(ArgumentError, match="Slow, which does not tell"):
        encode([asked("q", "a", "a")], Model(None, Slow(), "span", (), ()), 8, 0)


# ------------------------------------------------------------------- loss and answers


def test_the_loss_by_hand():
    first, last = [1.0, 2.0, -1.0], [0.5, 0.0, 3.0]
    logits = torch.tensor([first, last], dtype=torch.float64).T[None]

    def nll(row: list[float], at: int) -> float:
        row = torch.tensor(row, dtype=torch.float64)
        return (row.exp().sum().log() - row[at]).item()

    expected = (nll(first, 1) + nll(last, 2)) / 2
    found = loss(logits, torch.tensor([[1, 2]]), "none", 0.0)
    assert found.shape == (1,) and found.item() == pytest.approx(expected, rel=1e-12)


def test_the_best_span_by_hand():
    #            none, question,         the text, padding
    first = [[1.0, 9.0, 2.0, 0.0, 3.0, 9.0], [0.0, 0.0, 0.0, 1.0, 4.0, 0.0]]
    last = [[0.5, 9.0, 5.0, 1.0, 1.0, 9.0], [0.0, 0.0, 9.0, 2.0, 1.0, 0.0]]
    context = torch.tensor([[False, False, True, True, True, False]] * 2)
    logits = torch.tensor([first, last]).permute(1, 2, 0)
    rows = best(torch.tensor([0.1, 0.2]), logits, context)
    # 3 + 5 is more, but ends before it begins; so is 4 + 9, and 1 + 9.
    expected = [[0.1, 2, 2, 7.0, 1.5], [0.2, 2, 2, 9.0, 0.0]]
    torch.testing.assert_close(rows, torch.tensor(expected))


def test_an_answer_has_at_most_30_tokens():
    first, last = torch.zeros(1, 40), torch.zeros(1, 40)
    first[0, 2], last[0, 31], last[0, 32] = 5.0, 1.0, 2.0
    context = torch.ones(1, 40, dtype=torch.bool)
    rows = best(torch.zeros(1), torch.stack([first, last], -1), context)
    assert rows[0, 1:3].tolist() == [2, 31]


def windows(examples, owners, places) -> Windows:
    offsets = [torch.tensor(p, dtype=torch.int32) for p in places]
    return Windows([[0]] * len(owners), [(0, 0)] * len(owners), 0, examples, owners, offsets)


def test_the_answer_comes_from_the_best_window():
    examples = [asked("q", "a film", "film"), asked("q", "a plot", "plot")]
    words = [[0, 0], [0, 1], [2, 6]]
    data = windows(examples, [0, 0, 1], [words] * 3)
    rows = torch.tensor(
        [[0, 1, 1, 3.0, 8.0], [0, 2, 2, 4.0, 9.0], [0, 1, 2, -5.0, 0.0]],
    )
    assert answers(rows, data) == ["film", "a plot"]  # each question has an answer here

    data = windows([*examples, asked("q", "a cast")], [0, 0, 1, 2], [words] * 4)
    rows = torch.cat([rows, torch.tensor([[0, 1, 1, 1.0, 2.0]])])
    assert answers(rows, data) == ["", "", ""]
    rows[0, NONE] = 3.5  # less than 4, in one of its windows
    assert answers(rows, data) == ["film", "", ""]


def test_scores_are_squads():
    pytest.importorskip("torchmetrics")
    examples = [
        asked("q", "The  Film, it is", "Film", "The  Film, it"),
        asked("q", "a great plot", "great plot"),
        asked("q", "a cast"),
        asked("q", "a story"),
    ]
    places = [[[0, 0], [0, 4], [5, 9]], [[0, 0], [0, 1], [2, 7]], *[[[0, 0], [0, 1], [2, 6]]] * 2]
    data = windows(examples, [0, 1, 2, 3], places)
    rows = torch.tensor(
        [[1.0, 1, 2, 9, 0], [2.0, 2, 2, 9, 0], [3.0, 1, 1, 0, 9], [6.0, 2, 2, 9, 0]],
    )
    assert answers(rows, data) == ["The  Film", "great", "", "stor"]
    found, left_out = score(rows, data)
    # Articles do not count; one of two words is F1 2/3; no answer is right, one too many is not.
    assert found["squad_em"] == pytest.approx(100 * (1 + 0 + 1 + 0) / 4)
    assert found["squad_f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    assert found["loss"] == pytest.approx(3.0) and not left_out


# ------------------------------------------------------------------------ fine-tuning


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    """What is the film like, or the plot: a word of the text each; and of one in five, nothing."""
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


def finetune(model, data, output, *words) -> dict:
    fixed = ["--steps", 150, "--lr", 0.01, "--device", "cpu", "--output", output]
    assert main(["finetune", model, data, *map(str, (*fixed, *words))]) == 0
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("method", ["lora", "lora-peft", "delta-lora", "diffora", "full"])
def test_it_learns_to_find_answers(method, bert, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    if method == "lora-peft":
        pytest.importorskip("peft")
    result = finetune(bert, questions, tmp_path / "out", "--method", method)
    before, after = result["before"], result["after"]
    assert before["squad_f1"] < 50 and after["squad_f1"] > 95 and after["squad_em"] > 95
    assert after["loss"] < before["loss"] / 4
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["examples"]["heldout"] and {r["predicted"] for r in rows} > {""}
    right = [row["predicted"] == row["answers"] for row in rows]
    assert 100 * sum(right) / len(right) == pytest.approx(after["squad_em"], abs=1e-3)


def test_the_merged_model_gives_the_same_answers(bert, questions, tmp_path):
    finetune(bert, questions, tmp_path / "out", "--method", "delta-lora", "--steps", 40)
    words = ["merge", bert, str(tmp_path / "out" / "adapter"), str(tmp_path / "merged")]
    assert main(words) == 0
    merged = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    _, heldout = split_examples(read_examples(questions), 0.1, seed=0)
    data = encode(heldout, load_model(bert, "span"), 128, 64)
    forward = ModelRunner(merged, torch.device("cpu"), torch.float32)
    found = answers(predict(forward, data, 8), data)
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        assert found == [row["predicted"] for row in csv.DictReader(file)]


def test_a_decoder_learns_too(llama, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    result = finetune(llama, questions, tmp_path / "out", "--method", "lora")
    assert result["after"]["squad_f1"] > 80 > 50 > result["before"]["squad_f1"]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_body_is_the_pre_trained_one(name, request):
    folder = request.getfixturevalue(name)
    module = load_model(folder, "span").module
    body = getattr(module, module.base_model_prefix).state_dict()
    trained = transformers.AutoModel.from_pretrained(folder).state_dict()
    assert len(body) >= 20 and all(torch.equal(p, trained[n]) for n, p in body.items())


def test_windows_of_a_text_that_is_cut(bert, questions, tmp_path):
    pytest.importorskip("torchmetrics")
    words = ["--method", "lora", "--max-length", 10, "--doc-stride", 4, "--steps", 400]
    result = finetune(bert, questions, tmp_path / "out", *words)
    assert result["examples"]["train"] > 400 and result["after"]["squad_f1"] > 90


def test_without_torchmetrics(bert, questions, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.text", None)
    result = finetune(bert, questions, tmp_path / "out", "--method", "lora", "--steps", 1)
    assert set(result["after"]) == {"loss"}
    assert set(result["metrics_left_out"]) == {"squad_em", "squad_f1"}


def test_a_preset_of_table_7(bert, questions, tmp_path):
    words = ["--preset", "diffora/squad-v2-0.16", "--steps", 3, "--search-rounds", 2]
    result = finetune(bert, questions, tmp_path / "out", *words)
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
