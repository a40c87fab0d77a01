"""Rows of CSV and TSV files, by the strict reader of the standard library.

A row of another length than the header is an error: its cells would be taken for those of other
columns.
"""

import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence

from ...errors import ArgumentError
from .layout import Layout, delimiter_character
from .source import Row, Source

DELIMITERS = ",;\t|"  # those that a header shows
BLANK = "blank"


def csv_rows(source: Source) -> Iterator[Row]:
    """Rows of comma-separated values, or of values with another delimiter."""
    layout = source.layout
    with source.open() as file:
        first = file.readline()
        if layout.delimiter is None:
            with _long_cells():
                delimiter = _shown_delimiter(first, layout)
        else:
            delimiter = delimiter_character(layout.delimiter)
        lines = _chain(first, file)
        yield from _rows(source, csv.reader(lines, delimiter=delimiter, strict=True), delimiter)


def tsv_rows(source: Source) -> Iterator[Row]:
    """Rows of tab-separated values, in which a quotation mark is a mark like any other."""
    with source.open() as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        yield from _rows(source, lines, "\t")


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _shown_delimiter(header: str, layout: Layout) -> str:
    """The delimiter that makes the asked columns of a header, or else the most columns."""
    if not layout.has_header:
        return DELIMITERS[0]
    try:
        columns = {
            d: [cell.strip() for cell in next(csv.reader([header], delimiter=d), [])]
            for d in DELIMITERS
        }
    except csv.Error:  # the reader of the rows will say what is wrong
        return DELIMITERS[0]
    asked = set(layout.asked)
    for delimiter, names in columns.items():
        if asked and asked <= set(names):
            return delimiter
    return max(DELIMITERS, key=lambda d: len(columns[d]))


def _rows(source: Source, lines, delimiter: str) -> Iterator[Row]:
    header: list[str] | None = None
    for number, cells in _numbered(source, lines):
        if not any(cell.strip() for cell in cells) and len(cells) < 2:
            source.skipped.add(BLANK, source.place(number))
        elif header is not None:
            _check_length(source, number, cells, header, delimiter)
            yield Row(source.place(number), dict(zip(header, cells, strict=True)))
        elif source.layout.has_header:
            header = [cell.strip() for cell in cells]
            _check_header(source, number, header)
        else:
            header = list(map(str, range(len(cells))))
            yield Row(source.place(number), dict(zip(header, cells, strict=True)))


def _numbered(source: Source, lines) -> Iterator[tuple[int, list[str]]]:
    """Each row with the number of the line on which it begins; rows may have several lines."""
    with _long_cells():
        while True:
            number = lines.line_num + 1
            try:
                cells = next(lines, None)
            except csv.Error as error:
                accepted = "CSV in which each quoted cell ends with its quotation mark"
                raise ArgumentError("data", f"{source.place(number)}: {error}", accepted) from error
            if cells is None:
                return
            yield number, cells


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Take cells of any length. The limit belongs to the whole process, so it is put back."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(source: Source, number: int, header: Sequence[str]) -> None:
    for name in source.layout.asked or ["text"]:
        if header.count(name) > 1:
            given = f"{source.place(number)}: {header.count(name)} columns {name!r}"
            raise ArgumentError("data", given, "columns with names of their own")


def _check_length(
    source: Source, number: int, cells: Sequence[str], header: Sequence[str], delimiter: str
) -> None:
    if len(cells) == len(header):
        return
    if len(cells) > len(header):
        what = f"cell {len(header) + 1} ({cells[len(header)]!r:.40}) is beyond the last column"
    else:
        what = f"column {header[len(cells)]!r} is missing"
    given = f"{source.place(number)}: {len(cells)} cells for {len(header)} columns; {what}"
    accepted = f"rows of one length; a cell that holds {delimiter!r} has to be quoted"
    if delimiter == "\t":
        accepted = "rows of one length"
    raise ArgumentError("data", given, accepted)
