"""Checkpoints of a run: folders checkpoint-STEP in its output folder; the latest counts."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..files import reading, whole_folder, write_text
from ..loop import rng_states, set_rng_states
from .training_setup import TrainingSetup


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


def save_checkpoint(
    output: Path, progress: Progress, setup: TrainingSetup, scaler: torch.amp.GradScaler
) -> Path:
    """Write ``output/checkpoint-STEP`` whole or not at all, then delete the earlier ones."""
    target = output / f"checkpoint-{progress.step}"
    with whole_folder(target) as folder:
        setup.save(folder / "adapter")
        state = {
            "optimizer": setup.optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            **rng_states(),
        }
        torch.save(state, folder / "state.pt")
        write_text(folder / "progress.json", json.dumps(dataclasses.asdict(progress)))
    for other in find_checkpoints(output)[:-1]:
        shutil.rmtree(other)
    return target


def find_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the latest last."""
    found = [p for p in output.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def load_checkpoint(folder: Path, setup: TrainingSetup, scaler: torch.amp.GradScaler) -> Progress:
    """Restore what `save_checkpoint` wrote. Only tensors are unpickled.

    Raises:
        CheckpointError: a part is missing or garbled.
    """
    with reading(folder, "a checkpoint of this run"):
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        setup.load(folder / "adapter")
        setup.optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    set_rng_states(state)
    return progress
