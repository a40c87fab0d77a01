"""`locked`: at most one run is at work in a folder.

The kernel holds the lock on an open file, so that it ends with the process that took it, however
that ends. The file says who holds it. One that a killed process left is taken over by the next.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError
from ..files import make_folder

LOCK_FILE = ".deltadiff.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is made where it is missing, while the block runs.

    A folder that was made for it and is still empty afterwards is removed again.

    Raises:
        ArgumentError: it is no folder, or nothing can be written into it, or another process holds
            its lock; the message names that.
    """
    if folder.exists() and not folder.is_dir():
        raise ArgumentError("output", folder, "a folder")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        make_folder("output", folder)
        handle = _take(folder / LOCK_FILE)
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(handle)
    finally:
        for place in made:
            with contextlib.suppress(OSError):  # it is not empty
                place.rmdir()


def _take(path: Path) -> int:
    """An open file that holds the lock."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, path)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                os.ftruncate(handle, 0)
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                words = f"process {os.getpid()} on {socket.gethostname()} since {now}"
                os.write(handle, words.encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the file of a run that just ended and removed it


def _lock(handle: int, path: Path) -> None:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        given = f"{path.parent}, where {holder} is at work"
        accepted = "a folder of its own, or this one when that run has ended"
        raise ArgumentError("output", given, accepted) from None
    except (ImportError, OSError) as error:
        print(f"{path.parent} cannot be locked ({error}): start no second run in it")
