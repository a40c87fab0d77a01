"""The formats of text: each is a function from a `Source` to examples.

A new format is a new function and a row in FORMATS.
"""

from collections.abc import Callable, Iterator

from ...errors import ArgumentError
from . import dataset_rows, tables
from .conversations import as_text
from .examples import Example
from .json_rows import array_rows, jsonl_rows, parse
from .layout import is_column
from .rows import examples_from
from .source import Row, Source

Format = Callable[[Source], Iterator[Example]]


def _lines(source: Source) -> Iterator[Example]:
    """Plain text: each line is an example."""
    with source.open() as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield Example(line.strip(), place=source.place(number))


def _labelled_lines(source: Source) -> Iterator[Example]:
    """A label, a space and a text on each line: the form in which SST-2 is often distributed."""
    with source.open() as file:
        for number, line in enumerate(file, 1):
            place = source.place(number)
            label, _, text = line.strip().partition(" ")
            if label and not text:
                accepted = "a label, a space and a text on each line"
                raise ArgumentError("data", f"{place}: {label:.60}", accepted)
            if label:
                label = label if is_column(source.layout.label) else None
                yield Example(text.strip(), label, place=place)


def _squad_questions(source: Source) -> Iterator[Example]:
    """SQuAD's JSON: questions, each with the paragraph that it is about; a paragraph is a group."""
    with source.open() as file:
        value = parse(file.read(), source.name)
    try:
        yield from _questions(value, source)
    except (KeyError, TypeError) as error:
        given = f"{source.name}, JSON in which {error!r:.60} was met"
        raise ArgumentError("data", given, "the structure of SQuAD's files") from error


def _questions(value: dict, source: Source) -> Iterator[Example]:
    for article in _objects(value["data"]):
        for paragraph in _objects(article["paragraphs"]):
            text = _text(paragraph["context"], f"{source.name}, a context")
            for asked in _objects(paragraph["qas"]):
                place = f"{source.name}, question {asked.get('id', asked['question'])!r:.60}"
                question = _text(asked["question"], place)
                found = ((a["text"], a["answer_start"]) for a in _objects(asked["answers"]))
                answers = tuple((_text(answer, place), at) for answer, at in found)
                for answer, at in answers:
                    if not answer or at < 0 or text[at : at + len(answer)] != answer:
                        given = f"{place}: {answer!r:.60}, which is not at {at} of {text!r:.60}"
                        raise ArgumentError("data", given, "answers that stand in their text")
                if text.strip():
                    yield Example(text, prompt=question, group=text, answers=answers, place=place)
                else:
                    source.skipped.add("without text", place)


def _objects(value: object) -> Iterator[dict]:
    """The JSON objects in a list; TypeError for anything else."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} for a list")
    for item in value:
        if not isinstance(item, dict):
            raise TypeError(f"{item!r:.40} for an object")
        yield item


def _text(value: object, place: str) -> str:
    text = as_text(value, place)
    if text is None:
        raise TypeError("null for a text")
    return text


def _json(source: Source) -> Iterator[Example]:
    """What people call .json: an array of rows, SQuAD's questions, or a row on each line."""
    with source.open() as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return examples_from(array_rows(source, text), source)
    if '"paragraphs"' in text and '"qas"' in text:
        return _squad_questions(source)
    return examples_from(jsonl_rows(source), source)


def _table(rows: Callable[[Source], Iterator[Row]]) -> Format:
    return lambda source: examples_from(rows(source), source)


FORMATS: dict[str, Format] = {
    "csv": _table(tables.csv_rows),
    "tsv": _table(tables.tsv_rows),
    "jsonl": _table(jsonl_rows),
    "json": _json,
    "parquet": _table(dataset_rows.parquet_rows),
    "arrow": _table(dataset_rows.arrow_rows),
    "dataset": _table(dataset_rows.folder_rows),
    "txt": _lines,
    "label-text": _labelled_lines,
    "squad": _squad_questions,
}
