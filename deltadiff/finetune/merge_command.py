"""`deltadiff merge`: fold an adapter into its model and save an ordinary Hugging Face model."""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from ..checks import need_package
from ..errors import ArgumentError
from ..files import as_folder, whole_folder
from ..layers.adapter_file import load_adapter
from ..layers.adapter_format import read_adapter_config
from ..layers.merge import merge_
from ..layers.peft_files.read import is_peft_folder, read_peft
from .models import find_model, load_model
from .tasks.base import Task
from .tasks.classes import ClassTask
from .tasks.spans import SpanTask
from .tasks.text import TextTask

# Files beside the weights that belong to the tokenizer, under the names that Hugging Face uses.
TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "*.model", "*.bpe", "*.spm",
)  # fmt: skip


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
    place, labels = find_model(args.model), _labels(adapter)
    model, tokenizer = _load_with_adapter(args.model, place, adapter, labels)
    print(merge_(model))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(output) as folder:
            model.save_pretrained(folder)
            if place.is_dir():
                for file in (file for pattern in TOKENIZER_FILES for file in place.glob(pattern)):
                    shutil.copy(file, folder)
            else:
                tokenizer.save_pretrained(folder)
    except OSError as error:
        raise ArgumentError("OUTPUT", f"{output} ({error})", "a folder that can be made") from error
    print(f"saved in {output}")
    return 0


def _labels(adapter: Path) -> tuple[str, ...]:
    """The classes of the head that was trained beside the adapter, if there is one."""
    if is_peft_folder(adapter):
        shapes = [t.shape for t in read_peft(adapter).saved.values()]
    else:
        config = read_adapter_config(adapter)
        shapes = [config["base"][name] for name in config["saved"]]
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    return tuple(str(i) for i in range(min(rows, default=0)))


def _load_with_adapter(
    name: str, place: Path, adapter: Path, labels: tuple[str, ...]
) -> tuple[nn.Module, object]:
    """(model with the adapter on it, tokenizer), in the class that the adapter was made for.

    That is the class in the model's config, or the one in which `deltadiff finetune` loads it.
    """

    def as_configured():
        return _load_configured(place), None

    def as_finetuned(task: Task):
        loaded = load_model(name, task, dtype="auto")
        return loaded.module, loaded.tokenizer

    order: list[Callable] = [as_configured] if place.is_dir() else []
    if labels:
        order = [partial(as_finetuned, task) for task in (ClassTask(labels), SpanTask())] + order
    else:
        order.append(partial(as_finetuned, TextTask()))
    errors = []
    for load in order:
        try:
            model, tokenizer = load()
            load_adapter(model, adapter)
            return model, tokenizer
        except ArgumentError as error:
            errors.append(error)
    raise errors[0]


def _load_configured(folder: Path) -> nn.Module:
    transformers = need_package("transformers", "finetune")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        names = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures
        kind = getattr(transformers, names[0]) if names else transformers.AutoModel
        return kind.from_pretrained(folder, local_files_only=True, dtype="auto")
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        accepted = "a model that transformers saved"
        raise ArgumentError("MODEL_FOLDER", f"{folder} ({error})", accepted) from error
