"""`Layout`: what a user says about a file of text."""

import codecs
import csv
from dataclasses import dataclass

from ...errors import ArgumentError


@dataclass(frozen=True)
class Layout:
    """Which columns of a table to read, and how the file is written. None leaves it to the file.

    The column "none" means none, also where a package has a default.

    Attributes:
        text, label, prompt, group: names of columns, or their numbers in a table without header.
        labels: rows whose label is not among these are left out, if there are any.
        format: one of `formats.FORMATS`; by default that of the file's ending.
        delimiter: what stands between the cells of a CSV file, one character or "tab"; by default
            the header shows it.
        encoding: by default that of the byte order mark, else UTF-8.
    """

    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    group: str | None = None
    labels: tuple[str, ...] = ()
    format: str | None = None
    delimiter: str | None = None
    encoding: str | None = None

    @property
    def asked(self) -> list[str]:
        """The columns that were named."""
        named = (self.text, self.label, self.prompt, self.group)
        return [name for name in named if is_column(name)]

    @property
    def has_header(self) -> bool:
        """Whether the first row names the columns. Columns given as numbers, from 0, say no."""
        return not (self.asked and all(name.isdigit() for name in self.asked))

    def check(self) -> None:
        """Check the values that no file is needed for.

        Raises:
            ArgumentError: no such encoding, a delimiter that cannot be one, or one for another
                format than CSV.
        """
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
                "".encode(self.encoding)  # Python has codecs for other things than text, too
            except (LookupError, ValueError) as error:
                accepted = "an encoding that Python knows, such as utf-8, cp1252 or utf-16"
                raise ArgumentError("encoding", repr(self.encoding), accepted) from error
        if self.delimiter is not None:
            accepted = 'one character, or "tab", for CSV'
            if self.format not in (None, "csv"):
                raise ArgumentError("delimiter", f"{self.delimiter!r} for {self.format}", accepted)
            try:
                csv.reader([], delimiter=delimiter_character(self.delimiter))
            except (TypeError, ValueError) as error:
                raise ArgumentError("delimiter", repr(self.delimiter), accepted) from error
            if self.delimiter in ('"', "\n", "\r"):
                raise ArgumentError("delimiter", repr(self.delimiter), accepted)


DEFAULT_LAYOUT = Layout()


def is_column(name: str | None) -> bool:
    """Whether a name stands for a column."""
    return name not in (None, "none")


def delimiter_character(delimiter: str) -> str:
    """The character that ``--delimiter`` names. Few shells let anybody type a tab."""
    return "\t" if delimiter in ("tab", "\\t") else delimiter
