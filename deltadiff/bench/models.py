"""Models with random weights, by their Hugging Face config, and a random batch for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

_LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "use_cache": False,
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        name: what records call it.
        config: the entries of its config, or where its config.json (or the folder of that) is.
        classifies: a sequence classifier; else a causal language model.
    """

    name: str
    config: Mapping | Path
    classifies: bool = False


LLAMA_7B = ModelShape("Llama-2-7B", _LLAMA)
LLAMA_8B = ModelShape(
    "Llama-3.1-8B",
    {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
)
LLAMA_70B = ModelShape(
    "Llama-3.1-70B",
    {
        **LLAMA_8B.config, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64,
    },
)  # fmt: skip
LLAMA_1B = ModelShape(
    "Llama 1B",
    {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
)  # fmt: skip
LLAMA_SMALL = ModelShape(
    "Llama-2 small",
    {
        **_LLAMA, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 1024,
    },
)  # fmt: skip
BERT = ModelShape(
    "BERT-base",
    {
        "model_type": "bert", "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12,
        # The model's own dropout would take the same time in every variant.
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
    classifies=True,
)  # fmt: skip


def shape_of_file(path: Path) -> ModelShape:
    """The model of a config.json, or of the folder that holds one; named after the folder."""
    folder = path.parent if path.suffix == ".json" else path
    return ModelShape(folder.resolve().name, path)


def build_model(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model, made on ``device`` with random weights, frozen, in training mode.

    Gradient checkpointing is off in evaluation mode, hence training mode.

    Raises:
        ArgumentError: transformers is not installed, or cannot make such a model of the config.
    """
    try:
        import transformers
    except ImportError as error:
        accepted = "an installed transformers: pip install -e '.[finetune]'"
        raise ArgumentError("transformers", f"nothing ({error})", accepted) from error
    if isinstance(shape.config, Mapping):
        config = transformers.AutoConfig.for_model(**shape.config)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(shape.config, local_files_only=True)
        except (OSError, ValueError) as error:
            accepted = "a Hugging Face config.json or its folder"
            raise ArgumentError("--config", f"{shape.config} ({error})", accepted) from error
    task = "SequenceClassification" if shape.classifies else "CausalLM"
    auto = getattr(transformers, f"AutoModelFor{task}")
    torch.manual_seed(0)
    try:
        with device:
            model = auto.from_config(config, dtype=dtype)
    except ValueError as error:
        accepted = "the config of a causal language model"
        raise ArgumentError("--config", f"{shape.config} ({error})", accepted) from error
    return model.train().requires_grad_(False)


class Batch(NamedTuple):
    """Input embeddings (batch, sequence, hidden), and labels: tokens, or a class per text."""

    embeds: Tensor
    labels: Tensor


def random_batch(
    model: nn.Module, shape: ModelShape, batch: int, sequence: int, device: torch.device
) -> Batch:
    """A batch of random tokens, embedded, with labels that fit the model."""
    tokens = torch.randint(model.config.vocab_size, (batch, sequence), device=device)
    labels = tokens
    if shape.classifies:
        labels = torch.randint(model.config.num_labels, (batch,), device=device)
    return Batch(model.get_input_embeddings()(tokens).detach(), labels)
