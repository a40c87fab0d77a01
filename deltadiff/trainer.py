"""`DeltaLoRACallback`: Delta-LoRA under transformers' Trainer and trainers derived from it.

    optimizer = deltadiff.DeltaLoRA(model, lr=2e-4, update_ratio=0.5)
    trainer = Trainer(model, args, optimizers=(optimizer, None), callbacks=[DeltaLoRACallback()])

A Trainer saves and loads the model and the optimizer by itself, and resuming needs no callback. But
after training it loads the best model alone, and PEFT's file of that model holds A and B without
the update of W. This file is imported by nothing else, for it imports transformers.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import ArgumentError, ArgumentTypeError
from .layers.lora_layers import lora_layers
from .optim.delta_lora import DeltaLoRA
from .optim.update_share import UpdateShare

SHARE = "delta_lora_share"  # the key of the logs


class DeltaLoRACallback(TrainerCallback):
    """Brings back the update of the best model, and logs how much of each update reaches W.

    At each logging step of an in-place run, ``delta_lora_share`` in ``state.log_history`` is the
    share of this step's update that reached W (see `UpdateShare`). After training with
    ``load_best_model_at_end``, the optimizer's state of the best checkpoint is loaded, which holds
    the update of W of a PEFT model (other models hold it themselves).

    Raises:
        ArgumentTypeError: (when training begins) the Trainer's optimizer is not a `DeltaLoRA`.
        ArgumentError: ``save_only_model`` together with ``load_best_model_at_end`` for a PEFT
            model, whose checkpoints would then lack the update of W.
    """

    def __init__(self) -> None:
        self._noted: UpdateShare | None = None
        self._share: float | None = None
        self._filters = warnings.catch_warnings()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _delta_lora(kwargs["optimizer"])
        if not _needs_optimizer(args, kwargs["model"]):
            return
        if args.save_only_model:
            given = "True with load_best_model_at_end, for a PEFT model"
            raise ArgumentError("save_only_model", given, "False: optimizer.pt has the update of W")
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        # Loading the best model drops the update, which `on_train_end` brings back.
        warnings.filterwarnings("ignore", "adapter .* was loaded from a file without Delta-LoRA")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not _needs_optimizer(args, kwargs["model"]):
            return
        self._filters.__exit__(None, None, None)
        if state.best_model_checkpoint is None:
            return
        path = Path(state.best_model_checkpoint) / "optimizer.pt"
        optimizer = _delta_lora(kwargs["optimizer"])
        saved = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(saved)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # ``state.logging_steps`` is what a fraction in the arguments comes to.
        if state.logging_steps and (state.global_step + 1) % state.logging_steps == 0:
            self._noted = UpdateShare(_delta_lora(kwargs["optimizer"]))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._noted is not None:
            self._share, self._noted = self._noted.measure(), None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self._share is None or not state.log_history or "loss" not in state.log_history[-1]:
            return
        state.log_history[-1][SHARE] = self._share
        if logs is not None:  # for the callbacks after this one
            logs[SHARE] = self._share
        self._share = None


def _needs_optimizer(args: TrainingArguments, model: torch.nn.Module) -> bool:
    """Whether the best model lacks the update of W until the optimizer's state is loaded."""
    in_peft = any(layer.in_peft for layer in lora_layers(model).values())
    return bool(args.load_best_model_at_end) and in_peft


def _delta_lora(optimizer: Any) -> DeltaLoRA:
    """The `DeltaLoRA` inside of accelerate's wrapper."""
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, DeltaLoRA):
        accepted = "Trainer(optimizers=(deltadiff.DeltaLoRA(model), None))"
        raise ArgumentTypeError("optimizer", type(found).__name__, accepted)
    return found
