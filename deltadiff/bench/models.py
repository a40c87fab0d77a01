"""Models with random weights, by their Hugging Face config, and a random batch for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..layers.quantise import quantise_

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
QWEN3_8B = ModelShape(
    "Qwen3-8B",
    {
        **_LLAMA, "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
)  # fmt: skip
PRESETS = {shape.name: shape for shape in (LLAMA_7B, LLAMA_8B, QWEN3_8B)}
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


def use_liger_(model: nn.Module) -> None:
    """Put Liger's kernels into a model of transformers, in place, as ``use_liger_kernel`` does.

    Raises:
        ArgumentError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
    except ImportError as error:
        accepted = "an installed liger-kernel: pip install liger-kernel"
        raise ArgumentError("--liger", f"nothing ({error})", accepted) from error
    apply(model=model)


def to_nf4_(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the linear layers but the head as NF4, scales quantised again, in place.

    Raises:
        ArgumentError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        accepted = "an installed bitsandbytes: pip install bitsandbytes"
        raise ArgumentError("--base", f"nf4, without bitsandbytes ({error})", accepted) from error
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or layer is head:
                continue
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None,
                compute_dtype=dtype, quant_type="nf4", device="meta",
            )  # fmt: skip
            packed.weight = bnb.nn.Params4bit(
                layer.weight.detach(), requires_grad=False, quant_type="nf4", module=packed
            ).to(layer.weight.device)  # which quantises it
            packed.bias = layer.bias
            setattr(parent, name, packed.train(layer.training))


def to_fp8_(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the linear layers but the head in FP8, one scale for each, in place."""
    quantise_(model, "fp8", granularity="tensor")


# How the weights of the linear layers are stored, and what stores them so, in place, for a model
# and its dtype.
BASES: dict[str, Callable[[nn.Module, torch.dtype], object]] = {
    "bf16": lambda model, dtype: model,
    "nf4": to_nf4_,
    "fp8": to_fp8_,
}


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
