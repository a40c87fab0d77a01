"""`Source`: a file to read, as all formats get it."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ...errors import ArgumentError
from .layout import Layout
from .skipped import Skipped

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

# What they raise for a file that is damaged, or that cannot be read.
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)

# The longer marks come first: that of UTF-32 begins like that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class Row(NamedTuple):
    """A row of a table: its cells by the names of their columns, and where it stands."""

    place: str
    cells: dict[str, object]


@dataclass(frozen=True)
class Source:
    """A file or folder to read.

    Attributes:
        name: what the user calls it, for messages.
        path: where it is.
        layout: what the user says about it.
        skipped: gets what is left out of it.
        split: the split of a folder that holds several.
    """

    name: str
    path: Path
    layout: Layout = Layout()
    skipped: Skipped = field(default_factory=Skipped)
    split: str | None = None

    def place(self, line: int) -> str:
        return f"{self.name}, line {line}"

    @contextlib.contextmanager
    def open(self) -> Iterator[io.TextIOBase]:
        """The decoded text, with its line ends as they are.

        Raises:
            ArgumentError: in the block, the file cannot be read, unpacked or decoded.
        """
        encoding = self.layout.encoding or self._marked_encoding()
        if codecs.lookup(encoding).name == "utf-8":
            encoding = "utf-8-sig"  # which takes UTF-8 without a mark, too
        try:
            with self._opener(self.path, "rt", encoding=encoding, newline="") as file:
                yield file
        except UnicodeError as error:
            given = f"{self._undecodable(encoding)}, which is not {encoding.removesuffix('-sig')}"
            accepted = f"text in one encoding; --encoding names another one ({error})"
            raise ArgumentError("data", given, accepted) from error
        except UNREADABLE as error:
            raise ArgumentError("data", f"{self.name}: {error}", "a readable file") from error

    @property
    def _opener(self):
        return OPENERS.get(self.path.suffix, open)

    def _marked_encoding(self) -> str:
        try:
            with self._opener(self.path, "rb") as file:
                start = file.read(4)
        except UNREADABLE as error:
            raise ArgumentError("data", f"{self.name}: {error}", "a readable file") from error
        return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")

    def _undecodable(self, encoding: str) -> str:
        """Where the first bytes stand that are no text."""
        with contextlib.suppress(UnicodeError, *UNREADABLE):
            options = {"encoding": encoding, "errors": "surrogateescape", "newline": ""}
            with self._opener(self.path, "rt", **options) as file:
                for number, line in enumerate(file, 1):
                    found = re.search("[\udc80-\udcff]", line)
                    if found:
                        byte = ord(found[0]) - 0xDC00
                        return f"{self.place(number)}, character {found.start() + 1}: {byte:#x}"
        return self.name
