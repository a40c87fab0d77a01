"""Full fine-tuning and BitFit: parameters of the model itself are trained, with torch's AdamW.

What is trained is kept in float32 if the model runs in 16 bits.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ...errors import ArgumentError, CheckpointError
from ..inputs import RunInputs
from ..models import Model
from ..training_setup import TrainingSetup
from .targets import query_value

if TYPE_CHECKING:
    from ..settings import Settings


def full(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    return train_parameters(inputs, settings, _names(inputs.model.module))


def full_no_embeddings(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """All but the embeddings; an output layer that is tied to them is frozen with them."""
    module = inputs.model.module
    tables = {n for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    chosen = [n for n in _names(module) if n.rpartition(".")[0] not in tables]
    return train_parameters(inputs, settings, chosen)


def full_qv(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """The matrices W_Q and W_V without their biases."""
    chosen = [f"{name}.weight" for name in query_value(inputs.model.module)]
    return train_parameters(inputs, settings, chosen)


def bitfit(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    names = [n for n in _names(inputs.model.module) if n.rpartition(".")[2] == "bias"]
    chosen = [n for n in names if n.partition(".")[0] not in inputs.model.head]
    return train_parameters(inputs, settings, chosen)


def train_parameters(
    inputs: RunInputs, settings: "Settings", chosen: Collection[str]
) -> TrainingSetup:
    """Train the parameters named ``chosen``, and those of the head.

    Raises:
        ArgumentError: nothing is chosen.
    """
    model, module = inputs.model, inputs.model.module
    if not chosen:
        given = f"{settings.method}, of whose parameters this model has none"
        raise ArgumentError("method", given, "another method for this model")
    head = {n for n in _names(module) if n.partition(".")[0] in model.head}
    module.requires_grad_(False)
    for prefix, owner in module.named_modules():
        own = dict(owner.named_parameters(prefix, recurse=False))
        trained = [p for name, p in own.items() if name in head or name in chosen]
        if trained and not isinstance(owner, nn.Linear | nn.Embedding):
            owner.float()  # a normalisation takes its weight and bias in one dtype
        for p in trained:
            p.data = p.data.float()
            p.requires_grad_(True)
    return TrainingSetup(
        module,
        adamw(module.parameters(), settings),
        save=lambda folder: _save_trained(module, folder),
        load=lambda folder: _load_trained(module, folder),
        keep=lambda folder: _save_model(model, folder),
        kept_in="model",
    )


def adamw(params: Iterable[nn.Parameter], settings: "Settings") -> torch.optim.AdamW:
    """torch's AdamW on those of ``params`` that are trained."""
    params = [p for p in params if p.requires_grad]
    on_gpu = params[0].is_cuda
    return torch.optim.AdamW(params, settings.lr, weight_decay=settings.weight_decay, fused=on_gpu)


def _names(module: nn.Module) -> list[str]:
    """The names of the parameters; one that stands in two places has the first name only."""
    return [name for name, _ in module.named_parameters()]


def _save_model(model: Model, folder: Path) -> None:
    """Save model and tokenizer in the form that transformers loads."""
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def _save_trained(module: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    save_file(trained, folder / "trained.safetensors")


@torch.no_grad()
def _load_trained(module: nn.Module, folder: Path) -> None:
    tensors = load_file(folder / "trained.safetensors")
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        raise CheckpointError(str(folder), "other parameters", "those that this method trains")
    for name, p in trained.items():
        p.copy_(tensors[name])
