"""`deltadiff merge`: fold an adapter into its model and save an ordinary Hugging Face model."""

import argparse
import contextlib
import re
import shutil
from pathlib import Path
from types import ModuleType

from torch import nn

from ..errors import ArgumentError
from ..files import as_folder, remove_leftovers, whole_folder
from ..layers.adapter_files.adapter_file import load_adapter
from ..layers.adapter_files.format import read_adapter_config
from ..layers.merge import merge_
from ..layers.peft_files.read import is_peft_folder, read_peft
from .models import find_model, load_model, loading_model
from .task_file import TEMPLATE_FILE, read_task
from .tasks.base import Task
from .tasks.classes import ClassTask
from .tasks.spans import SpanTask
from .tasks.text import TextTask
from .tokenizer_files import tokenizer_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `deltadiff merge`."""
    parser.add_argument("model", metavar="MODEL_FOLDER", help="the base model, as saved on disk")
    parser.add_argument("adapter", metavar="ADAPTER_FOLDER", help="what save_adapter or PEFT wrote")
    parser.add_argument("output", metavar="OUTPUT", help="a new or empty folder")


def run(args: argparse.Namespace) -> int:
    """Merge and save; the output folder appears when all of it is written."""
    adapter = as_folder("ADAPTER_FOLDER", args.adapter)
    output = as_folder("OUTPUT", args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError("OUTPUT", f"{output}, which is not empty", "a new or an empty folder")
    place = find_model(args.model)
    model, tokenizer = _load_with_adapter(args.model, place, adapter)
    print(merge_(model))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, re.escape(output.name))
        with whole_folder(output) as folder:
            model.save_pretrained(folder)
            _save_tokenizer(place, tokenizer, adapter, folder)
    except OSError as error:
        raise ArgumentError("OUTPUT", f"{output} ({error})", "a folder that can be made") from error
    print(f"saved in {output}")
    return 0


def _save_tokenizer(place: Path, tokenizer, adapter: Path, folder: Path) -> None:
    """The files of the base model's tokenizer, with the chat template that was trained with."""
    if not place.is_dir():
        tokenizer.save_pretrained(folder)
    else:
        files = tokenizer_files(place)
        for file in files:
            copy = shutil.copytree if file.is_dir() else shutil.copy
            copy(file, folder / file.name)
        if not files:
            print(f"{place} has no tokenizer, and so the merged model has none")
    if (adapter / TEMPLATE_FILE).exists():
        shutil.copy(adapter / TEMPLATE_FILE, folder)


def _outputs(adapter: Path) -> int:
    """How many outputs the head has that was trained beside the adapter; 0 if there is none."""
    if is_peft_folder(adapter):
        shapes = [t.shape for t in read_peft(adapter).saved.values()]
    else:
        config = read_adapter_config(adapter)
        shapes = [config["base"][name] for name in config["saved"]]
    return min((shape[0] for shape in shapes if len(shape) == 2), default=0)


def _load_with_adapter(name: str, place: Path, adapter: Path) -> tuple[nn.Module, object]:
    """(model with the adapter on it, tokenizer), in the class that the adapter was made for.

    `deltadiff finetune` leaves a file that tells what the outputs of a new head mean. Without it,
    the class is that in the model's config, or the one that fits the head.
    """
    task, outputs = read_task(adapter), _outputs(adapter)
    as_configured = [None] if place.is_dir() else []
    order: list[Task | None]
    if task is not None and task.outputs is not None:
        order = [task, *as_configured]
    elif outputs:
        order = [*as_configured, ClassTask(_known_labels(place, outputs)), SpanTask()]
    else:
        order = [*as_configured, TextTask()]
    errors = []
    for kind in order:
        try:
            model, tokenizer = _load(name, place, kind)
            load_adapter(model, adapter)
        except ArgumentError as error:
            errors.append(error)
            continue
        if task is None and isinstance(kind, ClassTask):
            given = f"the adapter does not name its {outputs} classes"
            print(f"{given}; they are called {', '.join(kind.labels[:5])} in config.json")
        return model, tokenizer
    raise errors[0]


def _load(name: str, place: Path, task: Task | None) -> tuple[nn.Module, object]:
    """(model, tokenizer) for a task; for None the class in the config, without a tokenizer."""
    if task is not None:
        loaded = load_model(name, task, dtype="auto")
        return loaded.module, loaded.tokenizer
    with _loading(place) as transformers:
        names = transformers.AutoConfig.from_pretrained(place, local_files_only=True).architectures
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        return kind.from_pretrained(place, local_files_only=True, dtype="auto"), None


def _known_labels(place: Path, outputs: int) -> tuple[str, ...]:
    """The classes in the base model's config if they are so many; else LABEL_0 and so on."""
    known: dict[int, str] = {}
    if place.is_dir():
        with _loading(place) as transformers:
            config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
            known = config.id2label or {}
    default = [f"LABEL_{i}" for i in range(outputs)]
    return tuple(known.values() if len(known) == outputs else default)


def _loading(place: Path) -> contextlib.AbstractContextManager[ModuleType]:
    return loading_model("MODEL_FOLDER", place, "a model that transformers saved")
