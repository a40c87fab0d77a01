"""Files: written whole or not at all, and read with an error that names the file.

Every file of deltadiff is written by a function of this module, so a crash at any moment leaves
the old file or the new one, never a part.
"""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .errors import ArgumentError, CheckpointError


def write_bytes(path: Path, blob: bytes) -> None:
    """Write a file so that ``path`` holds all of it or what it held before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp lets nobody else read it
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """`write_text` of JSON, which has no NaN and no infinity: they raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """`write_text` of a JSON list with one record per line, so that diffs stay small."""
    lines = [json.dumps(record, allow_nan=False) for record in records]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """`write_text` of comma-separated values, a line a row."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to write files into, which takes the place of ``target`` when the block ends.

    What is written reaches the disk before that. Where the block raises, ``target`` stays as it was
    and the new folder is removed.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def reading(path: Path, accepted: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block into a CheckpointError about ``path``.

    An ArgumentError passes as it is: it already names what is wrong.
    """
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # torch.load alone raises half a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(str(path), reason, accepted) from error


def slug(name: str) -> str:
    """``name``, of a GPU for instance, as part of a file's name: small letters, digits, hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
