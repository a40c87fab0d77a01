"""inputs.json: which settings, text and model a run began with, so that it goes on with the same.

    format, version    "deltadiff-inputs", 1
    settings           all of them, by name
    files              "data", "heldout", "model", "chat_template": for each file that the run reads
                       its size in bytes and its SHA-256, by its place in the folder
    checksum           SHA-256 of all other entries

The weights of the model are among its files. Hashing reads about 1 GB a second.
"""

import functools
import time
from dataclasses import asdict
from pathlib import Path

from ..errors import ArgumentError
from ..files import (
    check_format,
    read_sealed_json,
    reading,
    sha256_of_file,
    write_json,
    write_sealed_json,
)
from .data.reading import find_text
from .models import find_model
from .settings import Settings
from .tokenizer_files import tokenizer_files

FORMAT, VERSION = "deltadiff-inputs", 1
INPUTS_FILE, SETTINGS_FILE = "inputs.json", "settings.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.index.json")
_SLOW = 2.0  # seconds of hashing after which a run says what it did


def note_inputs(output: Path, settings: Settings) -> None:
    """Write settings.json and inputs.json, with which a run begins."""
    inputs = _inputs(settings)
    write_json(output / SETTINGS_FILE, asdict(settings))
    write_sealed_json(output / INPUTS_FILE, inputs)


def check_inputs(output: Path, settings: Settings, accept_changes: bool = False) -> None:
    """Check that the run in a folder began with these settings, this text and this model.

    With ``accept_changes`` the differences are printed, and are no error.

    Raises:
        CheckpointError: inputs.json is missing or garbled.
        ArgumentError: something differs; the message says what.
    """
    try:
        _check_same(output, _inputs(settings), "resume", "--accept-changes to go on all the same")
    except ArgumentError as error:
        if not accept_changes:
            raise
        print(f"going on all the same: {error.given}")


def note_or_check_files(output: Path, settings: Settings) -> None:
    """Write inputs.json of a comparison, or check that it began with this text and this model.

    Its runs have settings of their own.

    Raises:
        CheckpointError, ArgumentError: as `check_inputs`.
    """
    now = _inputs(settings) | {"settings": {}}
    if (output / INPUTS_FILE).exists():
        _check_same(output, now, "output", "a new folder")
    else:
        write_sealed_json(output / INPUTS_FILE, now)


def _check_same(output: Path, now: dict, argument: str, instead: str) -> None:
    path, accepted = output / INPUTS_FILE, "what a run leaves when it begins"
    saved = read_sealed_json(path, accepted)
    with reading(path, accepted):
        check_format(path, saved, FORMAT, VERSION)
        found = _differences(saved, now)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        given = f"{output}, which began with others: {'; '.join(found[:3])}{more}"
        raise ArgumentError(argument, given, f"what it began with, or {instead}")


def _differences(saved: dict, now: dict) -> list[str]:
    """What differs, a few words each."""
    then, found = saved["settings"], []
    follow = {"steps"} if now["settings"].get("epochs") is not None else set()  # from epochs
    for name, value in now["settings"].items():
        if name not in follow and then.get(name) != value:
            found.append(f"{name} was {then.get(name)!r} and is {value!r}")
    for role, files in now["files"].items():
        earlier = saved["files"].get(role, {})
        for name in sorted(files.keys() | earlier.keys()):
            one, other = earlier.get(name), files.get(name)
            if one != other:
                found.append(f"{role} file {name} {_change(one, other)}")
    return found


def _change(one: dict | None, other: dict | None) -> str:
    if one is None or other is None:
        return "is new" if one is None else "is gone"
    if one["bytes"] != other["bytes"]:
        return f"had {one['bytes']} bytes and has {other['bytes']}"
    return "has another SHA-256"


def _inputs(settings: Settings) -> dict:
    started = time.perf_counter()
    described = {k: v for k, v in asdict(settings).items() if k != "output"}  # it may be moved
    groups = {role: _describe(*place) for role, place in _places(settings).items()}
    size = sum(entry["bytes"] for files in groups.values() for entry in files.values())
    seconds = time.perf_counter() - started
    if seconds > _SLOW:
        print(f"hashed {size / 1e9:.1f} GB of text and weights in {seconds:.0f} s")
    return {"format": FORMAT, "version": VERSION, "settings": described, "files": groups}


def _places(settings: Settings) -> dict[str, tuple[Path, list[Path]]]:
    """The files of each role, with the folder that their names are relative to."""
    model = find_model(settings.model)
    places = {"data": _text(settings.data, settings)}
    try:
        float(settings.heldout)
    except ValueError:
        places["heldout"] = _text(settings.heldout, settings)
    places["model"] = (model, _model_files(model)) if model.is_dir() else (model.parent, [model])
    template = settings.chat_template
    if template is not None and template != "plain":
        places["chat_template"] = Path(template).parent, [Path(template)]
    return places


def _text(data: str, settings: Settings) -> tuple[Path, list[Path]]:
    place = find_text(data, settings.layout)
    if place.is_dir():
        return place, [path for path in place.rglob("*") if path.is_file()]
    return place.parent, [place]


def _model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that transformers reads, as far as they are there."""
    found = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    found += [folder / "config.json", folder / "generation_config.json"]
    for path in tokenizer_files(folder):
        found += path.rglob("*") if path.is_dir() else [path]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _describe(folder: Path, files: list[Path]) -> dict[str, dict]:
    found = {}
    for path in sorted(files):
        stat = path.stat()
        digest = _sha256(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        found[str(path.relative_to(folder))] = {"bytes": stat.st_size, "sha256": digest}
    return found


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, *unchanged: int) -> str:
    """The SHA-256 of a file, read once by a process: a comparison has many runs of one model."""
    return sha256_of_file(path)
