"""DiffoRA in two stages: a search for the modules to train, then the training of those.

The search leaves gates.json and gates.png in the output folder. While a run lasts the folder also
holds the state of the search, from which a run goes on that was stopped in either stage.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ... import diffora
from ...diffora.heat_map import plot_gates
from ...errors import ArgumentError
from ..inputs import RunInputs
from ..runner import ModelRunner
from ..training_setup import FirstStage, TrainingSetup
from .fused import refuse, train_pairs, train_pairs_and_weights
from .targets import find_targets

if TYPE_CHECKING:
    from ..settings import Settings

SEARCH_STATE = "search.pt"  # the file that `diffora.search` keeps in its folder


def search_and_train(inputs: RunInputs, settings: "Settings") -> FirstStage:
    refuse(settings, "use_rslora")
    return _search_first(inputs, settings, train_pairs)


def search_and_train_weights(inputs: RunInputs, settings: "Settings") -> FirstStage:
    """The second stage is Delta-LoRA."""
    refuse(settings, "use_rslora", "lora_dropout")
    return _search_first(inputs, settings, train_pairs_and_weights)


def random_modules(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """The control: as many modules of each layer, but at random and without a search."""
    refuse(settings, "use_rslora", "warm_start")
    module = inputs.model.module
    targets = find_targets(settings, module)
    candidates = diffora.find_candidates(module, targets, inputs.model.head)
    selection = diffora.random_selection(candidates, settings.ratio, settings.seed)
    return train_pairs(_apply(inputs, settings, selection, None), settings)


def _apply(
    inputs: RunInputs,
    settings: "Settings",
    selection: diffora.Selection,
    search: diffora.Search | None,
) -> nn.Module:
    """The model with pairs in what was selected, which start from ``search`` if there is one."""
    module = inputs.model.module
    print(
        diffora.apply_(
            module, selection, r=settings.r, lora_alpha=settings.alpha,
            share_r=settings.share_r or 1, share=settings.share_r > 0, warm_start=search,
            lora_dropout=settings.lora_dropout, modules_to_save=inputs.model.head,
            seed=settings.seed,
        )
    )  # fmt: skip
    return module


def _search_first(
    inputs: RunInputs,
    settings: "Settings",
    train: Callable[[nn.Module, "Settings"], TrainingSetup],
) -> FirstStage:
    """A search over the training text; ``train`` makes the setup for what was selected.

    Raises:
        ArgumentError: see `diffora.Search`, `diffora.split` and `GateMatrix.discretise`; the model
            is as it was.
    """
    module, model = inputs.model.module, inputs.model
    targets = find_targets(settings, module)
    state = diffora.Search(
        module, r=settings.r, lora_alpha=settings.alpha, target_modules=targets, lr=settings.lr,
        weight_decay=settings.weight_decay, gate_lr=settings.gate_lr,
        lora_dropout=settings.lora_dropout, modules_to_save=model.head, seed=settings.seed,
    )  # fmt: skip
    try:
        diffora.random_selection(state.candidates, settings.ratio)  # checks the ratio early
        data = diffora.split(len(inputs.train), settings.search_share, seed=settings.seed)
        most = min(len(data.train), len(data.valid))
        if settings.step_size > most:
            given = f"{settings.search_share} of {len(inputs.train)} examples"
            accepted = f"a share with {settings.step_size} examples to train and to validate each"
            raise ArgumentError("search_share", given, accepted)
    except ArgumentError:
        state.close()
        raise
    runner = ModelRunner(module, model.task, inputs.device, inputs.dtype, settings.label_smoothing)

    def loss(indices: list[int]) -> torch.Tensor:
        return runner.mean_loss(inputs.train, indices, settings.batch_size)

    def run(output: Path) -> TrainingSetup:
        resume, started = (output / SEARCH_STATE).exists(), time.perf_counter()
        module.train()
        torch.manual_seed(settings.seed)  # for dropout; a search that goes on restores its state
        gates = diffora.search(
            state, loss, data, rounds=settings.search_rounds, inner_steps=settings.inner_steps,
            batch_size=settings.step_size, seed=settings.seed, folder=output, resume=resume,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        state.close()
        selection = gates.discretise(settings.ratio)
        gates.save(output / "gates.json")
        warm_start = state if settings.warm_start else None
        setup = train(_apply(inputs, settings, selection, warm_start), settings)
        setup.about["search"] = {
            "seconds": None if resume else seconds,  # the time before the stop is not known
            "validation_loss": state.gate_losses,
            "training_loss": state.inner_losses,
        }
        setup.figures["gates.png"] = lambda path: plot_gates(path, gates, selection)
        return setup

    return FirstStage(run)
