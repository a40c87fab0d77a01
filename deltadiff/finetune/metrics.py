"""What completions are scored by: the metrics of the papers, through the libraries that keep them.

If a library is missing, or Java, its metric is left out with the reason and the others stay.
Text is scored in lower case, cut into words and marks (NIST, ROUGE-L, METEOR, CIDEr), or as
sacrebleu cuts it (BLEU). The metrics of a task stand in the task's file.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence

Scores = tuple[dict[str, float], dict[str, str]]  # metrics, and why others were left out

TEXT_METRIC_TITLES = {
    "bleu": "BLEU", "nist": "NIST", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr",
}  # fmt: skip


def score_text(found: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU, NIST, METEOR, ROUGE-L and CIDEr of completions, each with one or more references.

    BLEU, METEOR and ROUGE-L are percentages; ROUGE-L is that of the nearest reference.
    """
    metrics = {
        "bleu": _bleu, "nist": _nist, "meteor": _meteor, "rouge_l": _rouge_l, "cider": _cider,
    }  # fmt: skip
    return add_metrics({}, metrics, list(found), [list(r) for r in references])


def add_metrics(found: dict[str, float], more: Mapping[str, Callable], *values) -> Scores:
    """Add to ``found`` each function of ``more``, called with ``values``, that gives a number.

    A metric whose library is missing, or that is not defined for the values, is left out.
    """
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


def words(text: str) -> list[str]:
    """Runs of letters and digits, and runs of marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def _bleu(found: list[str], references: list[list[str]]) -> float:
    import sacrebleu

    most = max(map(len, references))
    columns = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return sacrebleu.corpus_bleu(found, columns, lowercase=True).score


def bleu_counts(found: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[int]]:
    """Of each completion the numbers whose sums BLEU is a function of.

    They are its length, that of the nearest reference, how many of its n-grams are in a reference
    for n from 1 to 4, and how many it has. Empty without sacrebleu.
    """
    try:
        import sacrebleu
    except ImportError:
        return []
    rows = []
    for text, right in zip(found, references, strict=True):
        score = sacrebleu.sentence_bleu(text, list(right), lowercase=True)
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return rows


def _nist(found: list[str], references: list[list[str]]) -> float:
    from nltk.translate.nist_score import corpus_nist

    try:
        return corpus_nist([[words(r) for r in rs] for rs in references], list(map(words, found)))
    except ZeroDivisionError:  # all completions together have fewer than 5 words
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
        raise ImportError("METEOR needs Java, which is not installed")
    return 100 * Meteor().compute_score(*_captions(found, references))[0]


def _cider(found: list[str], references: list[list[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(*_captions(found, references))[0]


def _captions(found: list[str], references: list[list[str]]) -> tuple[dict, dict]:
    """References and completions in the form that pycocoevalcap takes."""
    return (
        {i: [" ".join(words(r)) for r in rs] for i, rs in enumerate(references)},
        {i: [" ".join(words(f))] for i, f in enumerate(found)},
    )
