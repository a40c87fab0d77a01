"""LoRA, Delta-LoRA, AdaLoRA, DyLoRA and FLoRA with deltadiff's layers and optimizers.

The head that a task adds is trained whole under all of them.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import ArgumentError
from ...layers.adapter_files.adapter_file import load_adapter, save_adapter
from ...layers.flora import swap_flora_
from ...layers.peft_files.export import export_peft
from ...layers.rounded import ROUNDED
from ...layers.swap import swap_
from ...optim.adalora import AdaLoRA, swap_adalora_
from ...optim.delta_lora import DeltaLoRA
from ...optim.dylora import DyLoRA
from ..inputs import RunInputs
from ..training_setup import TrainingSetup
from .targets import find_targets

if TYPE_CHECKING:
    from ..settings import Settings


def lora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    return train_pairs(_swapped(inputs, settings, settings.alpha), settings)


def lora_alpha_control(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """LoRA with alpha (1 + lambda): what Delta-LoRA under Adam is, apart from its first K steps."""
    alpha = settings.alpha * (1 + settings.update_ratio)
    return train_pairs(_swapped(inputs, settings, alpha), settings)


def delta_lora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    refuse(settings, "lora_dropout")
    return train_pairs_and_weights(_swapped(inputs, settings, settings.alpha), settings)


def adalora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """r is the average rank at the end; the branch is scaled by alpha / r from the start."""
    refuse(settings, "lora_dropout", "use_rslora")
    module, steps = inputs.model.module, settings.steps
    init_r = settings.init_r or -(-3 * settings.r // 2)
    print(
        swap_adalora_(
            module, init_r=init_r, lora_alpha=settings.alpha * init_r / settings.r,
            target_modules=find_targets(settings, module), modules_to_save=inputs.model.head,
            seed=settings.seed,
        )
    )  # fmt: skip
    optimizer = AdaLoRA(
        module, lr=settings.lr, weight_decay=settings.weight_decay, total_step=steps,
        target_r=settings.r, tinit=steps // 10, tfinal=steps // 2, deltaT=settings.deltaT,
    )  # fmt: skip
    return _adapter_setup(module, optimizer, settings, penalty=optimizer.orthogonality)


def dylora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """Ranks 1 to r are trained; in evaluation and in the adapter the model has rank r."""
    module = _swapped(inputs, settings, settings.alpha)
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "seed": settings.seed}
    return _adapter_setup(module, DyLoRA(module, **options), settings)


def flora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    refuse(settings, "use_rslora")
    module = inputs.model.module
    print(
        swap_flora_(
            module, r=settings.r, lora_alpha=settings.alpha,
            target_modules=find_targets(settings, module), lora_dropout=settings.lora_dropout,
            modules_to_save=inputs.model.head, seed=settings.seed,
        )
    )  # fmt: skip
    return train_pairs(module, settings)


# ------------------------------------------------- parts that DiffoRA's methods have in common


def refuse(settings: "Settings", *names: str) -> None:
    """Reject settings that the method does not support.

    Raises:
        ArgumentError: one of them is not 0 or False.
    """
    for name in names:
        value = getattr(settings, name)
        if value:
            raise ArgumentError(name, value, f"{type(value)()} for method {settings.method}")


def train_pairs(module: nn.Module, settings: "Settings") -> TrainingSetup:
    """AdamW on the adapters; the weight W stays as it is."""
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return _adapter_setup(module, DeltaLoRA(module, **options, update_ratio=0.0), settings)


def train_pairs_and_weights(module: nn.Module, settings: "Settings") -> TrainingSetup:
    """Delta-LoRA: AdamW on the low-rank pairs, and W takes part in their changes."""
    optimizer = DeltaLoRA(
        module, lr=settings.lr, weight_decay=settings.weight_decay,
        update_ratio=settings.update_ratio, start_step=settings.start_step,
        w_update=settings.w_update, rounding=settings.rounding, seed=settings.seed,
    )  # fmt: skip
    return _adapter_setup(module, optimizer, settings)


def _swapped(inputs: RunInputs, settings: "Settings", alpha: float) -> nn.Module:
    module = inputs.model.module
    print(
        swap_(
            module, r=settings.r, lora_alpha=alpha, target_modules=find_targets(settings, module),
            lora_dropout=settings.lora_dropout, use_rslora=settings.use_rslora,
            modules_to_save=inputs.model.head, seed=settings.seed,
        )
    )  # fmt: skip
    return module


def _adapter_setup(
    module: nn.Module, optimizer: torch.optim.Optimizer, settings: "Settings", **more
) -> TrainingSetup:
    """A setup whose result is an adapter; ``more`` are other fields of `TrainingSetup`."""
    in_peft_format = settings.adapter_format == "peft"
    return TrainingSetup(
        module, optimizer,
        save=lambda folder: _save(module, folder),
        load=lambda folder: load_adapter(module, folder),
        keep=lambda folder: (_keep_for_peft if in_peft_format else _keep)(module, folder),
        read_back=load_adapter, **more,
    )  # fmt: skip


def _save(module: nn.Module, folder: Path) -> None:
    """Save the adapter in a checkpoint, where the optimizer's state holds W as it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ROUNDED)
        save_adapter(module, folder)


def _keep(module: nn.Module, folder: Path) -> None:
    save_adapter(module, folder)


def _keep_for_peft(module: nn.Module, folder: Path) -> str | None:
    """Write PEFT's format; where that cannot be, the trained adapter is kept in deltadiff's."""
    try:
        print(export_peft(module, folder))
    except ArgumentError as error:
        save_adapter(module, folder)
        return f"not 'peft' ({error}); the adapter is in deltadiff's"
    return None
