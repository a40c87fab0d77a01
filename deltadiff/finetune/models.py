"""Pre-trained models for `deltadiff finetune`: from folders and installed packages.

Nothing is fetched: a model is a folder, a GGUF file, or an installed package that ships one.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import ArgumentError


def package_folder(name: str) -> Path | None:
    """Folder of an installed package, which is not imported."""
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def find_model(name: str) -> Path:
    """The folder with config.json, or the GGUF file, of a folder, file or installed package.

    Raises:
        ArgumentError: nothing of the kind is there.
    """
    place = Path(name)
    if place.suffix == ".gguf" and place.is_file():
        return place
    folder, pattern = (place, "") if name and place.is_dir() else (package_folder(name), "**/")
    if folder is not None:
        for config in sorted(folder.glob(f"{pattern}config.json"), key=lambda p: len(p.parts)):
            if '"model_type"' in config.read_text(encoding="utf-8", errors="replace"):
                return config.parent
        for gguf in sorted(folder.glob(f"{pattern}*.gguf")):
            return gguf
    accepted = "a folder with config.json, a .gguf file, or an installed package that ships one"
    raise ArgumentError("model", f"{name!r}, in which there is no model", accepted)


# What an answer is: the next word; one of some classes; a number; part of a given text.
KINDS = {
    "text": "AutoModelForCausalLM",
    "class": "AutoModelForSequenceClassification",
    "number": "AutoModelForSequenceClassification",
    "span": "AutoModelForQuestionAnswering",
}


@dataclass
class Model:
    """A pre-trained model, ready for its task.

    ``kind``: of an answer, one of KINDS. ``labels``: the classes; empty for other kinds. ``head``:
    names of the modules that are new and have to be trained whole; empty for a causal language
    model.
    """

    module: nn.Module
    tokenizer: object
    kind: str
    labels: tuple[str, ...]
    head: tuple[str, ...]


def load_model(
    name: str,
    kind: str = "text",
    labels: Sequence[str] = (),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Model:
    """Load a causal language model, or for another of KINDS a model with a new linear head.

    Raises:
        ArgumentError: no such model, or one that transformers cannot load for this task.
    """
    try:
        import transformers
    except ImportError as error:
        accepted = "an installed transformers: pip install 'deltadiff[finetune]'"
        raise ArgumentError("model", f"{name!r} ({error})", accepted) from error

    place = find_model(name)
    where = {"pretrained_model_name_or_path": place, "local_files_only": True}
    if place.suffix == ".gguf":
        where |= {"pretrained_model_name_or_path": place.parent, "gguf_file": place.name}
    options = {"dtype": dtype}
    if kind != "text":
        outputs = {"class": len(labels), "number": 1, "span": 2}[kind]
        options |= {"num_labels": outputs, "ignore_mismatched_sizes": True}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a new head is no news here
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        if kind == "text":
            _check_generates(config)
        torch.manual_seed(seed)  # for the new head
        module = _load(getattr(transformers, KINDS[kind]), where, options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        accepted = "a model that transformers can load" + (
            " for text generation" if kind == "text" else ""
        )
        raise ArgumentError("model", f"{place}: {reason}", accepted) from error
    finally:
        transformers.logging.set_verbosity(level)
    if place.suffix == ".gguf":
        module = _without_quantisation(module)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    module.config.pad_token_id = tokenizer.pad_token_id
    if labels:
        module.config.id2label = dict(enumerate(labels))
        module.config.label2id = {label: i for i, label in enumerate(labels)}
    head = () if kind == "text" else _new_head(module)
    return Model(module, tokenizer, kind, tuple(labels), head)


def _load(auto, where: dict, options: dict) -> nn.Module:
    """The model with its pre-trained body, also where the checkpoint has another name for that."""
    from transformers import AutoModel

    module, found = auto.from_pretrained(**where, **options, output_loading_info=True)
    body = {n for n, _ in module.named_parameters() if n.startswith(f"{module.base_model_prefix}.")}
    if body and body <= set(found["missing_keys"]):  # Llama's model for questions is like this
        trained, found = AutoModel.from_pretrained(
            **where, dtype=options["dtype"], output_loading_info=True
        )
        if set(found["missing_keys"]) >= {name for name, _ in trained.named_parameters()}:
            raise ValueError("the checkpoint has none of the model's weights")
        setattr(module, module.base_model_prefix, trained)
    return module


QUERY_VALUE = (
    "query", "value", "query_proj", "value_proj", "q_proj", "v_proj", "q_lin", "v_lin",
    "attn.q", "attn.v",
)  # fmt: skip


def query_value(module: nn.Module) -> list[str]:
    """Names of the linear layers that are W_Q and W_V of attention, which the papers tune.

    Raises:
        ArgumentError: none has a name that is known.
    """
    found = [
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and name.endswith(tuple(f".{end}" for end in QUERY_VALUE))
    ]
    if not found:
        given = "qv, for a model whose attention has neither " + " nor ".join(QUERY_VALUE[::2])
        raise ArgumentError("target_modules", given, "the names of its layers")
    return found


def _check_generates(config) -> None:
    """An encoder would learn to copy: it sees the token that it has to predict."""
    kinds = config.architectures or []
    if kinds and not any(k.endswith(("CausalLM", "LMHeadModel")) for k in kinds):
        raise ValueError(f"{kinds[0]} is no language model; give a label column")


def _without_quantisation(module: nn.Module) -> nn.Module:
    """A model from a GGUF file is float already but still counts as quantised: build it anew."""
    config = module.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(module)(type(module.config)(**config)).to(module.dtype)
    plain.load_state_dict(module.state_dict())
    return plain


def _new_head(module: nn.Module) -> tuple[str, ...]:
    """The children beside the pre-trained body that have parameters."""
    body = f"{module.base_model_prefix}."
    names = (name for name, _ in module.named_parameters() if not name.startswith(body))
    return tuple(dict.fromkeys(name.partition(".")[0] for name in names))
