"""`load_inputs`: the text, the model and the device that the settings of a run name."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..checks import NAMED_DTYPES
from ..devices import default_device, find_device
from ..errors import ArgumentError
from .batches import EncodedExamples
from .chat import read_template
from .data.examples import Example, split_examples
from .data.reading import read_examples
from .data.skipped import Skipped
from .models import Model, load_model
from .tasks.base import Task
from .tasks.choose import find_task
from .token_checks import check_generation, check_tokenizer, check_tokens

if TYPE_CHECKING:
    from .settings import Settings


@dataclass(frozen=True)
class RunInputs:
    """What a run trains, on what, and where.

    ``dtype`` is that of the frozen weights and the products, and ``skipped`` says what was left out
    of the text.
    """

    model: Model
    train: EncodedExamples
    heldout: EncodedExamples
    device: torch.device
    dtype: torch.dtype
    skipped: Skipped


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
    skipped = Skipped()
    examples, heldout = _read(settings, skipped)
    task, dtype = find_task(examples, settings), NAMED_DTYPES[settings.dtype]
    model = load_run_model(settings, task, device)
    if settings.chat_template is not None:
        if all(e.conversation is None for e in (*examples, *heldout)):
            given = f"{settings.chat_template} for text without conversations"
            raise ArgumentError("chat_template", given, "none")
        model.tokenizer.chat_template = read_template(settings.chat_template)
    encoded = []
    for name, part in (("training", examples), ("held-out", heldout)):
        data = task.encode(part, model.tokenizer, settings.max_length)
        check_tokens(data, model, settings.max_length, name)
        if data.cut:
            print(
                f"{data.cut} of {len(data)} {name} texts were cut at {settings.max_length} tokens"
            )
        skipped += data.skipped
        encoded.append(data)
    if settings.generate:
        check_generation(encoded[1], model, settings.max_new_tokens)
    if skipped:
        print(f"skipped: {skipped}")
    return RunInputs(model, *encoded, device, dtype, skipped)


def _read(settings: "Settings", skipped: Skipped) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those that are held out."""
    examples = read_examples(settings.data, settings.layout, skipped)
    try:
        share = float(settings.heldout)
    except ValueError:
        return examples, read_examples(settings.heldout, settings.layout, skipped)
    return split_examples(examples, share, settings.seed)


def load_run_model(settings: "Settings", task: Task, device: torch.device) -> Model:
    """The model of a run, before its method changes it.

    Raises:
        ArgumentError: see `load_model` and `check_tokenizer`; or the model cannot compute its
            activations again.
    """
    model = load_model(
        settings.model, task, dtype=NAMED_DTYPES[settings.dtype], seed=settings.seed,
        four_bit=device if settings.load_in_4bit else None,
    )  # fmt: skip
    check_tokenizer(model.tokenizer, settings.model)
    place_model(model, settings, device)
    if settings.gradient_checkpointing:
        # Reentrant checkpoints would stop the gradients: the embeddings, which are frozen, give
        # the first block an input that needs none.
        try:
            model.module.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ArgumentError(
                "gradient_checkpointing", error, "a model that can do it"
            ) from error
    return model


def place_model(model: Model, settings: "Settings", device: torch.device) -> None:
    """Bring a model that was loaded for a run to its device."""
    for head in model.head:
        model.module.get_submodule(head).float()  # trained whole, for which 16 bits are too few
    if not settings.load_in_4bit:  # such a model is where it has to be, and may not be moved
        model.module.to(device)
