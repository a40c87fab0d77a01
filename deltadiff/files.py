"""Files: written whole or not at all, and read with an error that names the file.

Every file that deltadiff writes goes through a function of this module. A crash at any moment
therefore leaves the old file or the new one, never a part of one.
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

from .errors import ArgumentError, ArgumentTypeError, CheckpointError, reason


def as_folder(name: str, value: object) -> Path:
    """The folder that argument ``name`` gives.

    Raises:
        ArgumentTypeError, ArgumentError: it is no path, or an empty one, which would be the current
            folder, where nobody meant to write.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ArgumentTypeError(name, f"{value!r:.60}", "a folder, as a str or a path")
    if not os.fspath(value):
        raise ArgumentError(name, "''", "a folder; '.' is the current one")
    try:
        os.stat(value)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name too long, or with a NUL; a folder in a file
        given = f"{ascii(os.fspath(value)):.60} ({reason(error)})"
        raise ArgumentError(name, given, "the name of a folder") from error
    return Path(value)


def make_folder(name: str, folder: Path) -> None:
    """Make the folder that argument ``name`` gives, if it is not there.

    Raises:
        ArgumentError: it cannot be made, or nothing can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        given = f"{folder} ({reason(error)})"
        raise ArgumentError(name, given, "a folder that can be written to") from error


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; no also where no disk could hold one of this name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def write_bytes(path: Path, blob: bytes) -> None:
    """Write a file. At any moment ``path`` holds all of ``blob``, or what it held before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes it for its owner alone
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, as `write_bytes` does.

    Raises:
        ValueError: the value holds a NaN or an infinity, which JSON does not have.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_records(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """`write_text` of a JSON list with one record per line, so that diffs stay small."""
    lines = [json.dumps(record, allow_nan=False) for record in records]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write rows as comma-separated values, one line per row, as `write_bytes` does."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_text(path, text.getvalue())


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a new folder to write files into; it becomes ``target`` when the block ends.

    All that was written reaches the disk first. If the block raises, ``target`` stays as it was and
    the new folder is removed. A crash leaves ``target`` as it was or complete, but for one case: a
    ``target`` that held files is removed a moment before the new folder takes its name.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        if target.exists() and any(target.iterdir()):  # os.replace takes an empty folder's place
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
    """Turn every exception of the block into a CheckpointError about ``path``.

    An ArgumentError passes unchanged, because it already names what is wrong.

    Args:
        path: the file that the block reads.
        accepted: what the file should have been, for the message.
    """
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # torch.load alone raises half a dozen kinds of them
        raise CheckpointError(str(path), reason(error), accepted) from error


def slug(name: str) -> str:
    """Make a name (of a GPU, for instance) fit for a file name: a-z, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
