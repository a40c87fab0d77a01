"""The answer is a span of a given text, as in SQuAD: two logits for each token.

The two logits of a token say whether the answer begins and whether it ends with it. See `windows`
for texts that are too long for the model.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..metrics import Scores, add_metrics
from .base import Task
from .windows import Windows, cut_windows

MOST_TOKENS = 30  # in an answer

LOSS, FIRST, LAST, SCORE, NONE = range(5)  # the columns of `SpanTask.prediction_rows`


@dataclass(frozen=True)
class SpanTask(Task):
    """Question answering; ``doc_stride`` is how many tokens neighbouring windows share."""

    doc_stride: int = 64

    name = "spans"
    auto_class = "AutoModelForQuestionAnswering"
    peft_type = "QUESTION_ANS"
    outputs = 2
    metric_titles = {"loss": "loss", "squad_em": "exact match", "squad_f1": "SQuAD F1"}
    headline = "loss"

    @classmethod
    def found_in(cls, examples, settings):
        asked = any(e.answers is not None for e in examples)
        return cls(settings.doc_stride) if asked else None

    def encode(self, examples, tokenizer, max_length) -> Windows:
        return cut_windows(examples, tokenizer, max_length, self.doc_stride)

    def logits(self, output):
        return torch.stack([output.start_logits, output.end_logits], dim=-1).float()

    def loss(self, logits, labels, reduction="mean", label_smoothing=0.0):
        """Mean of the cross entropies of first and last token.

        ``logits`` (windows, tokens, 2), ``labels`` (windows, 2) int64.
        """
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        return sum(cross_entropy(logits[..., i], labels[:, i], **options) for i in (0, 1)) / 2

    def prediction_rows(self, losses, logits, batch):
        """(windows, 5): loss, first and last token of the best span, its score, that of no answer.

        A score is the sum of two logits. A span lies in the text and has at most MOST_TOKENS.
        """
        context = batch["context"]
        first, last = logits.unbind(-1)
        tokens = first.shape[1]
        places = torch.arange(tokens, device=logits.device)
        length = places[None, :] - places[:, None]  # minus 1
        allowed = (length >= 0) & (length < MOST_TOKENS)
        allowed = allowed & context[:, :, None] & context[:, None, :]
        scores = (first[:, :, None] + last[:, None, :]).masked_fill(~allowed, -torch.inf)
        score, at = scores.flatten(1).max(1)
        columns = [losses, at // tokens, at % tokens, score, first[:, 0] + last[:, 0]]
        return torch.stack(columns, dim=1)

    def score(self, rows, data) -> Scores:
        """The loss of a window, and SQuAD's exact match and F1 in percent."""
        right = [[text for text, _ in e.answers] for e in data.examples]
        squad = cache(partial(_squad, best_answers(rows, data), right))
        more = {
            "squad_em": lambda: squad()["exact_match"],
            "squad_f1": lambda: squad()["f1"],
        }
        return add_metrics({"loss": rows[:, LOSS].mean().item()}, more)

    def predictions(self, rows, data):
        table = [["question", "predicted", "answers"]]
        for example, answer in zip(data.examples, best_answers(rows, data), strict=True):
            right = "\n".join(text for text, _ in example.answers)
            table.append([example.prompt, answer, right])
        return table


def best_answers(rows: Tensor, data: Windows) -> list[str]:
    """The answer to each example, from the rows (`SpanTask.prediction_rows`) of its windows.

    It is the best span of all windows. If some example has no answer, it is "" where "no answer"
    scores more than that span in every window.
    """
    may_miss = any(not e.answers for e in data.examples)
    found = [(-torch.inf, "")] * len(data.examples)
    missing = [torch.inf] * len(data.examples)
    for owner, offsets, row in zip(data.owners, data.offsets, rows.tolist(), strict=True):
        missing[owner] = min(missing[owner], row[NONE])
        if row[SCORE] > found[owner][0]:
            start, end = offsets[int(row[FIRST]), 0], offsets[int(row[LAST]), 1]
            found[owner] = row[SCORE], data.examples[owner].text[start:end].strip()
    return [
        "" if may_miss and none > score else text
        for (score, text), none in zip(found, missing, strict=True)
    ]


def _squad(found: list[str], right: list[list[str]]) -> dict[str, Tensor]:
    """SQuAD's scores, each against the nearest of the right answers.

    A question without an answer has the right answer "", as in SQuAD 2.
    """
    from torchmetrics.functional.text import squad

    given = [{"id": str(i), "prediction_text": text} for i, text in enumerate(found)]
    wanted = [
        {"id": str(i), "answers": {"text": texts or [""], "answer_start": [0] * max(1, len(texts))}}
        for i, texts in enumerate(right)
    ]
    return squad(given, wanted)
