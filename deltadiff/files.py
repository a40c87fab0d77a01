"""`write_atomically`: a crash at any moment leaves the old file or the new one."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ArgumentError, CheckpointError


def write_atomically(path: Path, blob: bytes) -> None:
    """Write a file so that ``path`` holds all of it or what it held before."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def reading(path: Path, accepted: str) -> Iterator[None]:
    """Whatever goes wrong in here is a CheckpointError about ``path``, but for bad arguments."""
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # torch.load alone raises half a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(str(path), reason, accepted) from error
