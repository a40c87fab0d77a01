"""`load_inputs`: the text, the model and the device that the settings of a run name."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..checks import NAMED_DTYPES
from ..devices import default_device, find_device
from .batches import EncodedExamples
from .data.examples import split_examples
from .data.reading import read_examples
from .models import Model, load_model
from .tasks.choose import find_task

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class RunInputs:
    """What a run trains, on what, and where. ``dtype``: of the frozen weights and the products."""

    model: Model
    train: EncodedExamples
    heldout: EncodedExamples
    device: torch.device
    dtype: torch.dtype


def device_of(settings: "Settings") -> torch.device:
    """The device that a run is on."""
    return find_device(default_device() if settings.device == "auto" else settings.device)


def load_inputs(settings: "Settings") -> RunInputs:
    """Read the text and the model; the same settings always give the same.

    Raises:
        ArgumentError: see `Settings.check`, `read_examples`, `find_task`, `load_model` and
            `Task.encode`.
    """
    settings.check()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device = device_of(settings)
    examples = read_examples(settings.data, settings.layout)
    try:
        share = float(settings.heldout)
    except ValueError:
        heldout = read_examples(settings.heldout, settings.layout)
    else:
        examples, heldout = split_examples(examples, share, settings.seed)
    task, dtype = find_task(examples, settings), NAMED_DTYPES[settings.dtype]
    model = load_model(settings.model, task, dtype=dtype, seed=settings.seed)
    for head in model.head:
        model.module.get_submodule(head).float()  # trained whole, for which 16 bits are too few
    model.module.to(device)
    train, held = (
        task.encode(part, model.tokenizer, settings.max_length) for part in (examples, heldout)
    )
    return RunInputs(model, train, held, device, dtype)
