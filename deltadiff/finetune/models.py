"""Pre-trained models for `deltadiff finetune`: from folders and installed packages.

Nothing is downloaded: a model is a folder, a GGUF file, or an installed package that ships one.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ..checks import need_package
from ..errors import ArgumentError, reason
from ..files import is_there
from .packages import package_folder
from .quantised import four_bit_options, keep_as_loaded, new_head
from .tasks.base import Task

HEAD_MAY_DIFFER = "ignore_mismatched_sizes"


def find_model(name: str) -> Path:
    """The folder with config.json, or the GGUF file, of a folder, file or installed package.

    Raises:
        ArgumentError: there is no model under this name.
    """
    place = Path(name)
    if place.suffix == ".gguf" and is_there(place) and place.is_file():
        return place
    known = bool(name) and is_there(place) and place.is_dir()
    folder, pattern = (place, "") if known else (package_folder(name), "**/")
    if folder is not None:
        for config in sorted(folder.glob(f"{pattern}config.json"), key=lambda p: len(p.parts)):
            if '"model_type"' in config.read_text(encoding="utf-8", errors="replace"):
                return config.parent
        for gguf in sorted(folder.glob(f"{pattern}*.gguf")):
            return gguf
    accepted = "a folder with config.json, a .gguf file, or an installed package that ships one"
    raise ArgumentError("model", f"{name!r}, in which there is no model", accepted)


@contextlib.contextmanager
def loading_model(argument: str, place: Path, accepted: str) -> Iterator[ModuleType]:
    """transformers without its messages; what it raises about a model becomes an ArgumentError.

    transformers and the packages below it check little of what the files of a model say: almost
    every kind of exception can come of them.

    Args:
        argument: what the message is about.
        place: where the model is.
        accepted: what it should have been, for the message.
    """
    transformers = need_package("transformers", "finetune", argument=argument)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns about every new head
    transformers.logging.disable_progress_bar()
    try:
        yield transformers
    except (ArgumentError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ArgumentError(argument, f"{place}: {reason(error)}", accepted) from error
    finally:
        transformers.logging.set_verbosity(level)


@dataclass
class Model:
    """A pre-trained model, ready for its task.

    ``head`` has the names of the modules that are new and have to be trained whole; it is empty if
    the task needs no new head.
    """

    module: nn.Module
    tokenizer: object
    task: Task
    head: tuple[str, ...]


def load_model(
    name: str,
    task: Task,
    *,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    four_bit: torch.device | None = None,
) -> Model:
    """Load a model in transformers' class for the task.

    Args:
        name: see `find_model`.
        dtype: of the weights; "auto" is that of the file.
        seed: that of a new head.
        four_bit: load the weights in 4 bits, onto this device; ``dtype`` is then that of the rest.

    Raises:
        ArgumentError: there is no such model, or transformers cannot load it for this task.
    """
    place = find_model(name)
    where = {"pretrained_model_name_or_path": place, "local_files_only": True}
    if place.suffix == ".gguf":
        if four_bit is not None:
            raise ArgumentError("load_in_4bit", f"{place}, a GGUF file", "a folder")
        where |= {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    options: dict[str, object] = {"dtype": dtype}
    if task.outputs is not None:
        options |= {"num_labels": task.outputs, HEAD_MAY_DIFFER: True}
    with loading_model("model", place, task.accepted_model) as transformers:
        auto = getattr(transformers, task.auto_class)
        heads = {} if task.outputs is None else {"num_labels": task.outputs}
        config = transformers.AutoConfig.from_pretrained(**where, **heads)
        task.check_config(config)
        if four_bit is not None:
            options |= four_bit_options(auto, config, dtype, four_bit)
        torch.manual_seed(seed)  # for the new head
        module = _load(auto, where, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        if place.suffix == ".gguf":
            module = _without_quantisation(module)
        _fit_tokenizer(tokenizer, module)
        tokenizer(["a", "b c"])  # what its files say is looked at in use
    if four_bit is not None:
        keep_as_loaded(module)
    task.configure(module.config)
    head = () if task.outputs is None else new_head(module)
    return Model(module, tokenizer, task, head)


def _fit_tokenizer(tokenizer, module: nn.Module) -> None:
    """Give a tokenizer a token to pad with, and let it tell sentences apart where the model does.

    Which tokenizers return ``token_type_ids`` says nothing: many do for models that take none.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    module.config.pad_token_id = tokenizer.pad_token_id
    known = inspect.signature(module.forward).parameters
    segments = "token_type_ids" in known and getattr(module.config, "type_vocab_size", 0) > 1
    names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = names + ["token_type_ids"] * segments


def _load(auto, where: dict, options: dict) -> nn.Module:
    """The model with its pre-trained body, also if the checkpoint has another name for that."""
    from transformers import AutoModel

    module, found = auto.from_pretrained(**where, **options, output_loading_info=True)
    body = {n for n, _ in module.named_parameters() if n.startswith(f"{module.base_model_prefix}.")}
    if body and body <= set(found["missing_keys"]):  # Llama's model for questions is like this
        kept = {k: v for k, v in options.items() if k not in ("num_labels", HEAD_MAY_DIFFER)}
        trained, found = AutoModel.from_pretrained(**where, **kept, output_loading_info=True)
        if set(found["missing_keys"]) >= {name for name, _ in trained.named_parameters()}:
            raise ValueError("the checkpoint has none of the model's weights")
        setattr(module, module.base_model_prefix, trained)
    return module


def _without_quantisation(module: nn.Module) -> nn.Module:
    """Build the model of a GGUF file anew: it is float already but still counts as quantised."""
    config = module.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(module)(type(module.config)(**config)).to(module.dtype)
    plain.load_state_dict(module.state_dict())
    return plain
