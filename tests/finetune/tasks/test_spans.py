"""Spans of a text: loss, the best span, answers and SQuAD's scores, all by hand."""

import pytest
import torch
from finetune_runs import asked

from deltadiff.finetune.tasks.spans import NONE, SpanTask, best_answers
from deltadiff.finetune.tasks.windows import Windows


def test_the_loss_by_hand():
    first, last = [1.0, 2.0, -1.0], [0.5, 0.0, 3.0]
    logits = torch.tensor([first, last], dtype=torch.float64).T[None]

    def nll(row: list[float], at: int) -> float:
        row = torch.tensor(row, dtype=torch.float64)
        return (row.exp().sum().log() - row[at]).item()

    expected = (nll(first, 1) + nll(last, 2)) / 2
    found = SpanTask().loss(logits, torch.tensor([[1, 2]]), "none")
    assert found.shape == (1,) and found.item() == pytest.approx(expected, rel=1e-12)


def test_the_best_span_by_hand():
    #            none, question,         the text, padding
    first = [[1.0, 9.0, 2.0, 0.0, 3.0, 9.0], [0.0, 0.0, 0.0, 1.0, 4.0, 0.0]]
    last = [[0.5, 9.0, 5.0, 1.0, 1.0, 9.0], [0.0, 0.0, 9.0, 2.0, 1.0, 0.0]]
    context = torch.tensor([[False, False, True, True, True, False]] * 2)
    logits = torch.tensor([first, last]).permute(1, 2, 0)
    rows = SpanTask().prediction_rows(torch.tensor([0.1, 0.2]), logits, {"context": context})
    # 3 + 5, and 4 + 9 and 1 + 9 below, are more, but those spans end before they begin.
    expected = [[0.1, 2, 2, 7.0, 1.5], [0.2, 2, 2, 9.0, 0.0]]
    torch.testing.assert_close(rows, torch.tensor(expected))


def test_an_answer_has_at_most_30_tokens():
    first, last = torch.zeros(1, 40), torch.zeros(1, 40)
    first[0, 2], last[0, 31], last[0, 32] = 5.0, 1.0, 2.0
    context = torch.ones(1, 40, dtype=torch.bool)
    rows = SpanTask().prediction_rows(
        torch.zeros(1), torch.stack([first, last], -1), {"context": context}
    )
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
    assert best_answers(rows, data) == ["film", "a plot"]  # each of these questions has an answer

    data = windows([*examples, asked("q", "a cast")], [0, 0, 1, 2], [words] * 4)
    rows = torch.cat([rows, torch.tensor([[0, 1, 1, 1.0, 2.0]])])
    assert best_answers(rows, data) == ["", "", ""]
    rows[0, NONE] = 3.5  # now "no answer" scores less than 4 in one of its windows
    assert best_answers(rows, data) == ["film", "", ""]


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
    assert best_answers(rows, data) == ["The  Film", "great", "", "stor"]
    found, left_out = SpanTask().score(rows, data)
    # SQuAD ignores articles; one of two words has F1 2/3. The last two questions have no answer:
    # the model gives none to the first of them, which is right, and one to the second.
    assert found["squad_em"] == pytest.approx(100 * (1 + 0 + 1 + 0) / 4)
    assert found["squad_f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    assert found["loss"] == pytest.approx(3.0) and not left_out
