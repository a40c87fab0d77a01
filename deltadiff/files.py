"""Files: written whole or not at all, and read with an error that names the file.

Every file that deltadiff writes goes through a function of this module. A crash at any moment
therefore leaves the old file or the new one, never a part of one. What a killed process leaves is
a file or folder under a temporary name, `.NAME.` and eight more letters, which `remove_leftovers`
finds. What deltadiff reads again is sealed: it carries a SHA-256, so that a bit that flipped on the
disk is an error and never another result.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError

from .errors import ArgumentError, ArgumentTypeError, CheckpointError, reason

_SEAL = b"sha256 "  # what a sealed file of bytes begins with


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
    with _naming(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                _hold(handle)
                file.write(blob)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes it for its owner alone
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block name the file, as those about an open file do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


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
    the new folder is removed. A crash leaves ``target`` as it was or complete.

    Raises:
        OSError: ``target`` is there and not empty, for which nothing can take its place at once.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        _hold(handle)
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        os.replace(temporary, target)
        _sync(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors says that a disk is full
            raise OSError(f"{target}: {reason(error)}") from error
        raise
    finally:
        os.close(handle)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what killed calls of `write_bytes` and `whole_folder` left in a folder.

    Args:
        folder: where they wrote; it may be missing.
        names: a regular expression for the names of what they wrote.
    """
    pattern = re.compile(rf"\.(?:{names})\.[a-z0-9_]{{8}}")
    for path in folder.iterdir() if folder.is_dir() else ():
        if not pattern.fullmatch(path.name) or path.is_symlink() or _is_held(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _hold(handle: int) -> None:
    """Mark what a handle is open on as in use, until it is closed or this process is dead."""
    with contextlib.suppress(ImportError, OSError):  # not every system has such locks
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Whether a process is at work on a file or folder, or one cannot tell."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


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


# ------------------------------------------------------------------------- checksums


def sha256_of_json(value: object) -> str:
    """The SHA-256 of a value's JSON, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of what is in a file, which may be larger than the memory."""
    digest, chunk = hashlib.sha256(), bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(memoryview(chunk)[:count])
    return digest.hexdigest()


def write_sealed_json(path: Path, value: Mapping[str, object]) -> None:
    """`write_json` of an object, with an entry "checksum": the SHA-256 of all others.

    Raises:
        ValueError: as `write_json`.
    """
    as_read = json.loads(json.dumps(value))
    write_json(path, {**value, "checksum": sha256_of_json(as_read)})


def read_sealed_json(path: Path, accepted: str) -> dict:
    """What `write_sealed_json` wrote, without the checksum.

    An object without a checksum, as earlier versions wrote it, is not checked.

    Args:
        path: the file.
        accepted: what it should have been, for the message.

    Raises:
        CheckpointError: the file is missing or garbled, or was changed after it was written.
    """
    with reading(path, accepted):
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise CheckpointError(str(path), "no JSON object", accepted)
        checksum = value.pop("checksum", None)
        if checksum not in (None, sha256_of_json(value)):
            given = "another checksum (damaged, or changed by hand)"
            raise CheckpointError(str(path), given, f"{accepted}, unchanged")
        return value


def check_format(path: Path, contents: Mapping, form: str, version: int) -> None:
    """Raise CheckpointError where the contents of a file are of another format or version."""
    found, number = contents["format"], contents["version"]
    if (found, number) != (form, version):
        given = f"format {found!r}, version {number!r}"
        raise CheckpointError(str(path), given, f"format {form!r}, version {version}")


def write_sealed(path: Path, blob: bytes) -> None:
    """Write a file, as `write_bytes` does, with a first line that holds its SHA-256."""
    digest = hashlib.sha256(blob).hexdigest().encode()
    write_bytes(path, _SEAL + digest + b"\n" + blob)


def read_sealed(path: Path) -> bytes:
    """What `write_sealed` wrote.

    A file without the first line, as earlier versions wrote it, is returned unchecked.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it was changed after it was written.
    """
    blob = path.read_bytes()
    line, _, content = blob.partition(b"\n")
    if blob[:2] == b"PK":  # the first bytes of what `torch.save` writes
        return blob
    if line != _SEAL + hashlib.sha256(content).hexdigest().encode():
        given = f"{len(blob)} bytes with another SHA-256 (truncated or damaged)"
        raise CheckpointError(str(path), given, "an unchanged file")
    return content


def slug(name: str) -> str:
    """Make a name (of a GPU, for instance) fit for a file name: a-z, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
