"""DiffoRA's first stage under `deltadiff finetune`: search, then hand the selection on.

The output folder gets gates.json and gates.png. While a run lasts it also holds search.pt, from
which one that was stopped, in either stage, goes on.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import diffora
from ..diffora.heat_map import plot_gates
from ..errors import ArgumentError
from .training import FirstStage, ModelRunner, Task, TrainingSetup

if TYPE_CHECKING:
    from .settings import Settings


FILE = "search.pt"


SecondStage = Callable[[diffora.Selection, diffora.Search | None], TrainingSetup]


def search_stage(task: Task, settings: "Settings", targets, second: SecondStage) -> FirstStage:
    """A search over the task's training text.

    ``second`` prepares what follows: it takes the selection, and the search for a warm start.

    Raises:
        ArgumentError: see `Search`, `split` and `discretise`; the model is as it was.
    """
    module, model = task.model.module, task.model
    state = diffora.Search(
        module, r=settings.r, lora_alpha=settings.alpha, target_modules=targets, lr=settings.lr,
        weight_decay=settings.weight_decay, gate_lr=settings.gate_lr,
        lora_dropout=settings.lora_dropout, modules_to_save=model.head, seed=settings.seed,
    )  # fmt: skip
    try:
        diffora.random_selection(state.candidates, settings.ratio)  # only to look at the ratio
        data = diffora.split(len(task.train), settings.search_share, seed=settings.seed)
        most = min(len(data.train), len(data.valid))
        if settings.batch_size > most:
            given = f"{settings.search_share} of {len(task.train)} examples"
            accepted = f"a share with {settings.batch_size} examples to train and to validate each"
            raise ArgumentError("search_share", given, accepted)
    except ArgumentError:
        state.close()
        raise
    forward = ModelRunner(module, task.device, task.dtype, settings.label_smoothing)

    def loss(indices: list[int]) -> torch.Tensor:
        return forward.loss(task.train.batch(indices, task.device))[0]

    def run(output: Path) -> TrainingSetup:
        resume, started = (output / FILE).exists(), time.perf_counter()
        module.train()
        torch.manual_seed(settings.seed)  # dropout; a search that goes on restores it
        gates = diffora.search(
            state, loss, data, rounds=settings.search_rounds, inner_steps=settings.inner_steps,
            batch_size=settings.batch_size, seed=settings.seed, folder=output, resume=resume,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        state.close()
        selection = gates.discretise(settings.ratio)
        gates.save(output / "gates.json")
        plot_gates(output / "gates.png", gates, selection)
        prepared = second(selection, state if settings.warm_start else None)
        prepared.about["search"] = {
            "seconds": None if resume else seconds,
            "validation_loss": state.gate_losses,
            "training_loss": state.inner_losses,
        }
        return prepared

    return FirstStage(run)
