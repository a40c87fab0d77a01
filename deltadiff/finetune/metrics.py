"""What a run is scored by: the metrics of the papers, through the libraries that keep them.

A library that is missing, or Java, leaves its metric out with the reason; the others are there.
Text is scored in lower case, cut into words and marks (NIST, ROUGE-L, METEOR, CIDEr), or as
sacrebleu cuts it (BLEU). Shares are percentages there, as in the papers.
"""

import math
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from .data import Encoded
from .question_answering import LOSS, Windows, answers

Scores = tuple[dict[str, float], dict[str, str]]  # metrics, and why others were left out


def score(rows: Tensor, data: Encoded) -> Scores:
    """Of what `training.predict` gave.

    Classes: accuracy, loss, Matthews' correlation, F1 (of the second of two classes, else the mean
    of all). Numbers: mean squared error, Pearson's and Spearman's correlation. Spans: loss, and
    SQuAD's exact match and F1, percentages. Text: negative log-likelihood of a token, perplexity.
    """
    if isinstance(data, Windows):
        right = [[text for text, _ in e.answers] for e in data.examples]
        both = cache(partial(_squad, answers(rows, data), right))
        more = {"squad_em": lambda: both()["exact_match"], "squad_f1": lambda: both()["f1"]}
        return _add({"loss": rows[:, LOSS].mean().item()}, more)
    if isinstance(data.labels[0], list):
        nll = (rows[:, 0].double().sum() / rows[:, 1].sum()).item()
        return {"nll_per_token": nll, "perplexity": math.exp(min(nll, 700))}, {}
    labels = torch.tensor(data.labels)
    if labels.is_floating_point():
        found, numbers = {"mse": mse_loss(rows.squeeze(-1), labels).item()}, rows.squeeze(-1)
        more = {"pearson": _pearson, "spearman": _spearman}
        return _add(found, more, numbers.double().tolist(), data.labels)
    predicted = rows.argmax(1)
    accuracy = (predicted == labels).double().mean().item()
    found = {"accuracy": accuracy, "loss": cross_entropy(rows, labels).item()}
    binary = rows.shape[1] == 2
    more = {"matthews": _matthews, "f1": lambda p, y: _f1(p, y, binary)}
    return _add(found, more, predicted.tolist(), data.labels)


def score_text(found: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of completions, each with one or more references.

    BLEU, METEOR and ROUGE-L are percentages; ROUGE-L is that of the nearest reference.
    """
    kinds = {
        "bleu": _bleu, "nist": _nist, "meteor": _meteor, "rouge_l": _rouge_l, "cider": _cider,
    }  # fmt: skip
    return _add({}, kinds, list(found), [list(r) for r in references])


def _add(found: dict[str, float], more: dict[str, Callable], *values) -> Scores:
    left_out = {}
    for name, metric in more.items():
        try:
            value = float(metric(*values))
        except ImportError as error:
            left_out[name] = str(error)
            continue
        if math.isfinite(value):
            found[name] = value
        else:
            left_out[name] = "not defined for these values"
    return found, left_out


# --------------------------------------------------------------- classes and numbers


def _matthews(predicted: list[int], labels: list[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, predicted)


def _f1(predicted: list[int], labels: list[int], binary: bool) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predicted, average="binary" if binary else "macro", zero_division=0)


def _pearson(predicted: list[float], labels: list[float]) -> float:
    from scipy.stats import pearsonr

    return pearsonr(predicted, labels).statistic if _vary(predicted, labels) else math.nan


def _spearman(predicted: list[float], labels: list[float]) -> float:
    from scipy.stats import spearmanr

    return spearmanr(predicted, labels).statistic if _vary(predicted, labels) else math.nan


def _vary(*columns: list[float]) -> bool:
    """A constant has no correlation."""
    return all(len(set(column)) > 1 for column in columns)


# ------------------------------------------------------------------------------- spans


def _squad(found: list[str], right: list[list[str]]) -> dict[str, Tensor]:
    """Of the nearest of the right answers; none is the answer "", as SQuAD 2 has it."""
    from torchmetrics.functional.text import squad

    given = [{"id": str(i), "prediction_text": text} for i, text in enumerate(found)]
    wanted = [
        {"id": str(i), "answers": {"text": texts or [""], "answer_start": [0] * max(1, len(texts))}}
        for i, texts in enumerate(right)
    ]
    return squad(given, wanted)


# -------------------------------------------------------------------------------- text


def words(text: str) -> list[str]:
    """Runs of letters and digits, and runs of marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def _bleu(found: list[str], references: list[list[str]]) -> float:
    import sacrebleu

    most = max(map(len, references))
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return sacrebleu.corpus_bleu(found, columns, lowercase=True).score


def _nist(found: list[str], references: list[list[str]]) -> float:
    from nltk.translate.nist_score import corpus_nist

    try:
        return corpus_nist([[words(r) for r in rs] for rs in references], list(map(words, found)))
    except ZeroDivisionError:  # completions of fewer than 5 words in all
        return math.nan


def _rouge_l(found: list[str], references: list[list[str]]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    each = [
        scorer.score_multi(r, f)["rougeL"].fmeasure for f, r in zip(found, references, strict=True)
    ]
    return 100 * sum(each) / len(each)


def _meteor(found: list[str], references: list[list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    if shutil.which("java") is None:
        raise ImportError("METEOR needs Java, which is not there")
    return 100 * Meteor().compute_score(*_captions(found, references))[0]


def _cider(found: list[str], references: list[list[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(*_captions(found, references))[0]


def _captions(found: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """References and completions as pycocoevalcap takes them."""
    return (
        {i: [" ".join(words(r)) for r in rs] for i, rs in enumerate(references)},
        {i: [" ".join(words(f))] for i, f in enumerate(found)},
    )
