"""`write_atomically`: a crash at any moment leaves the old file or the new one."""

import os
import tempfile
from pathlib import Path


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
