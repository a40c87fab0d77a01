"""Checkpoints of a run: folders checkpoint-STEP in its output folder; the latest counts.

    checkpoint.json    format, version, the progress of the run, the SHA-256 of each file beside it,
                       and a checksum of all this
    state.pt           optimizer, gradient scaler and random generators
    adapter/           what was trained

The one before the latest is kept too, for the case that the latest is damaged on the disk.
"""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError, reason
from ..files import (
    check_format,
    read_sealed_json,
    reading,
    sha256_of_file,
    whole_folder,
    write_sealed_json,
)
from ..loop import rng_states, set_rng_states
from .training_setup import TrainingSetup

FORMAT, VERSION = "deltadiff-checkpoint", 2
CHECKPOINT_FILE = "checkpoint.json"
_OLDER_FILE = "progress.json"  # of version 1, which had no checksums
_KEPT = 2  # so many of the latest


@dataclass
class Progress:
    """What a run has done so far; a checkpoint holds it as JSON.

    Attributes:
        step: how many steps are done.
        losses: the training loss of each step.
        step_seconds: the duration of each step.
        tokens: how many tokens all steps have seen.
        before: the held-out metrics before training.
        curve: the held-out metrics along the way, each with its "step".
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    before: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check what a file may have given; TypeError where it is no progress."""
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (self.step, self.tokens))
        for values in (self.losses, self.step_seconds):
            whole = whole and isinstance(values, list) and len(values) == self.step
            whole = whole and all(type(value) is float for value in values)
        tables = [self.before, *self.curve] if isinstance(self.curve, list) else [None]
        for table in tables:
            whole = whole and isinstance(table, dict)
            whole = whole and all(type(n) in (int, float, type(None)) for n in table.values())
        if not whole or not all("step" in table for table in tables[1:]):
            raise TypeError("a progress of other types or lengths")


def save_checkpoint(
    output: Path, progress: Progress, setup: TrainingSetup, scaler: torch.amp.GradScaler
) -> Path:
    """Write ``output/checkpoint-STEP`` whole or not at all, then delete those before the last two.

    One that is there stays: the same step of a run is the same state.
    """
    target = output / f"checkpoint-{progress.step}"
    if target in find_checkpoints(output):
        return target
    with whole_folder(target) as folder:
        setup.save(folder / "adapter")
        state = {
            "optimizer": setup.optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            **rng_states(),
        }
        try:
            torch.save(state, folder / "state.pt")
        except RuntimeError as error:  # which torch raises where a disk is full
            what = f"{target / 'state.pt'} could not be written whole"
            raise OSError(f"{what}; is the disk full? ({reason(error)})") from error
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        contents = {
            "format": FORMAT,
            "version": VERSION,
            "progress": dataclasses.asdict(progress),
            "files": {str(path.relative_to(folder)): sha256_of_file(path) for path in files},
        }
        write_sealed_json(folder / CHECKPOINT_FILE, contents)
    remove_checkpoints(output, _KEPT)
    return target


def find_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the latest last."""
    names = (CHECKPOINT_FILE, _OLDER_FILE)
    return [path for path in _numbered(output) if any((path / name).exists() for name in names)]


def remove_checkpoints(output: Path, kept: int = 0) -> None:
    """Remove the checkpoints of a run but for the latest ``kept``. Files of others in them stay."""
    found = find_checkpoints(output)
    for folder in found[: len(found) - kept]:
        try:
            names = read_sealed_json(folder / CHECKPOINT_FILE, "a checkpoint")["files"]
        except (CheckpointError, KeyError):
            print(f"{folder} stays: one cannot tell any more which of its files are a checkpoint's")
            continue
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for place in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            _remove_if_empty(place)
        (folder / CHECKPOINT_FILE).unlink()  # the last, so that a call that was killed is repeated
    for folder in _numbered(output):
        _remove_if_empty(folder)


def _numbered(output: Path) -> list[Path]:
    found = [p for p in output.glob("checkpoint-*") if p.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are as they were saved."""

    folder: Path
    progress: Progress

    def restore(self, setup: TrainingSetup, scaler: torch.amp.GradScaler) -> None:
        """Restore what `save_checkpoint` wrote. Only tensors are unpickled.

        Raises:
            CheckpointError: it is not one of this model and method.
        """
        with reading(self.folder, "a checkpoint of this run"):
            path = self.folder / "state.pt"
            state = torch.load(path, map_location="cpu", weights_only=True)
            setup.load(self.folder / "adapter")
            setup.optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            set_rng_states(state)


def open_latest(output: Path) -> Checkpoint | None:
    """The latest checkpoint of a run, when all of its files are as they were saved.

    Raises:
        CheckpointError: a file is missing or damaged, or of another version of deltadiff. The
            message says how to go on without it.
    """
    *earlier, folder = find_checkpoints(output) or [None]
    if folder is None:
        return None
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        given = "a checkpoint of version 1, which has no checksums"
        raise CheckpointError(str(folder), given, f"one of version {VERSION}; start the run anew")
    instead = earlier[-1].name if earlier else "the start"
    accepted = f"a checkpoint as it was saved; remove {folder} to go on from {instead}"
    contents = read_sealed_json(path, accepted)
    with reading(path, accepted):
        check_format(path, contents, FORMAT, VERSION)
        for name, digest in contents["files"].items():
            if sha256_of_file(folder / name) != digest:
                given = "another SHA-256 (damaged or changed)"
                raise CheckpointError(str(folder / name), given, accepted)
        return Checkpoint(folder, Progress(**contents["progress"]))
