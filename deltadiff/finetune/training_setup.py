"""`TrainingSetup`: what a method makes of a model, for the rest of the harness."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

ADAPTER = "adapter"  # the folder of the result, where it is an adapter


@dataclass(frozen=True)
class TrainingSetup:
    """What a method made of a model: what is trained, what trains it, and how it is kept.

    Attributes:
        module: the model with what the method added.
        optimizer: it has all parameters that are trained.
        save: writes what was trained into a folder.
        load: puts back what ``save`` wrote.
        penalty: a differentiable term that is added to the training loss; None for none.
        keep: writes the finished model into a folder, if that is not what ``save`` writes; returns
            what went wrong, if something did.
        kept_in: what that folder is called, in the output folder.
        read_back: puts what was written in a folder on a fresh base model; None where what was
            written is what was trained, bit by bit.
        about: more entries for result.json.
        figures: what draws more figures into files of the output folder, by their names.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    penalty: Callable[[], Tensor] | None = None
    keep: Callable[[Path], str | None] | None = None
    kept_in: str = ADAPTER
    read_back: Callable[[nn.Module, Path], object] | None = None
    about: dict[str, object] = field(default_factory=dict)
    figures: dict[str, Callable[[Path], object]] = field(default_factory=dict)

    def write(self, folder: Path) -> str | None:
        """Write the finished model into a folder; returns what went wrong, if something did."""
        if self.keep is not None:
            return self.keep(folder)
        self.save(folder)
        return None


@dataclass(frozen=True)
class FirstStage:
    """A search that comes before training.

    ``run`` takes the output folder and returns the setup of the training, with an entry "search" in
    ``about``.
    """

    run: Callable[[Path], TrainingSetup]
