"""The formats of text files: each is a function from an open file to examples.

A new format is a new function and a row in FORMATS.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..errors import ArgumentError
from .examples import Example


@dataclass(frozen=True)
class Columns:
    """Which columns of a table to read; "none" means none, also where a package has a default.

    Rows whose label is not in ``labels`` are left out, if ``labels`` is not empty.
    """

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    group: str | None = None
    labels: tuple[str, ...] = ()


DEFAULT_COLUMNS = Columns()  # the text in column "text", and nothing else


def is_column(name: str | None) -> bool:
    """Whether a name stands for a column."""
    return name not in (None, "none")


def _lines(file, columns: Columns) -> Iterator[Example]:
    """Plain text: each line is an example."""
    for line in file:
        if line.strip():
            yield Example(line.strip())


def _labelled_lines(file, columns: Columns) -> Iterator[Example]:
    """A label, a space and a text on each line: the form in which SST-2 is often distributed."""
    for number, line in enumerate(file, 1):
        label, _, text = line.strip().partition(" ")
        if label and not text:
            accepted = "a label, a space and a text on each line"
            raise ArgumentError("data", f"line {number}: {label:.60}", accepted)
        if label:
            yield Example(text.strip(), label if is_column(columns.label) else None)


def _squad_questions(file, columns: Columns) -> Iterator[Example]:
    """SQuAD's JSON: questions, each with the paragraph that it is about; a paragraph is a group."""
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


def _csv(file, columns: Columns) -> Iterator[Example]:
    yield from _from_rows(_table_rows(csv.reader(file), columns), columns)


def _tsv(file, columns: Columns) -> Iterator[Example]:
    lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _from_rows(_table_rows(lines, columns), columns)


def _jsonl(file, columns: Columns) -> Iterator[Example]:
    yield from _from_rows(_json_rows(file), columns)


def _table_rows(lines, columns: Columns) -> Iterator[tuple[int, dict]]:
    """Rows of a table. If columns are given as numbers (from 0), the table has no header."""
    asked = [c for c in (columns.text, columns.label) if is_column(c)]
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
    named = {f: c for f in ("label", "prompt", "group") if is_column(c := getattr(columns, f))}
    named["text"] = columns.text or "text"
    for number, row in rows:
        for field, column in named.items():
            if column not in row:
                given = f"{column!r}, which line {number} lacks"
                raise ArgumentError(f"{field}_column", given, f"one of {', '.join(row) or 'none'}")
        example = Example(**{field: row[column].strip() for field, column in named.items()})
        if example.text and (not columns.labels or example.label in (None, *columns.labels)):
            yield example


FORMATS: dict[str, Callable[[object, Columns], Iterator[Example]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
    "txt": _lines,
    "label-text": _labelled_lines,
    "squad": _squad_questions,
}
