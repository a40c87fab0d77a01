"""The training loop: steps, evaluation along the way, checkpoints, and how long a step takes."""

import math
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import Interrupted, NonFiniteLossError
from ..loop import LOSS_SYNC_INTERVAL, batch_indices, catch_interrupt
from .batches import EncodedExamples
from .checkpoints import Progress
from .runner import ModelRunner
from .training_setup import TrainingSetup

if TYPE_CHECKING:
    from .settings import Settings


def learning_rate(lr: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up to ``lr``, then linear decay to 0; ``step`` counts from 0.

    The first step has a rate above 0, unlike that of transformers' schedules.
    """
    warmup = max(1, min(warmup, steps))
    return lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def train(
    runner: ModelRunner,
    setup: TrainingSetup,
    scaler: torch.amp.GradScaler,
    data: EncodedExamples,
    progress: Progress,
    settings: "Settings",
    *,
    save: Callable[[], object],
    evaluate: Callable[[], dict[str, float]],
) -> None:
    """Train from ``progress.step`` to ``settings.steps``, and keep ``progress`` up to date.

    ``save`` is called every ``settings.save_every`` steps and after an interrupt. ``evaluate``
    returns what ``progress.curve`` gets every ``settings.evaluate_every`` steps (0: never).

    Raises:
        NonFiniteLossError: the loss became inf or NaN; nothing is saved after that step.
        Interrupted: Ctrl-C or SIGTERM; it holds what ``save`` returned.
    """
    from tqdm import tqdm

    optimizer, steps = setup.optimizer, settings.steps
    read_every = 1 if runner.device.type == "cpu" else LOSS_SYNC_INTERVAL
    runner.model.train()
    losses: list[Tensor] = []  # those of the latest steps, not yet read from the device
    with (
        catch_interrupt() as interrupt,
        tqdm(
            total=steps, initial=progress.step, unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
        ) as bar,
    ):  # fmt: skip
        started = time.perf_counter()
        while progress.step < steps and not interrupt:
            indices = batch_indices(len(data), settings.step_size, settings.seed, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings.lr, progress.step, steps, settings.warmup)
            loss = _backward(runner, setup, scaler, data, indices, settings.batch_size)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss)
            progress.step += 1
            progress.tokens += sum(len(data.ids[i]) for i in indices)
            should_save = progress.step % settings.save_every == 0 and progress.step < steps
            every = settings.evaluate_every
            should_evaluate = every and progress.step % every == 0
            ends = interrupt or progress.step == steps
            if len(losses) == read_every or should_save or should_evaluate or ends:
                _read_losses(losses, progress)
                seconds = time.perf_counter() - started
                progress.step_seconds += [seconds / len(losses)] * len(losses)
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", refresh=False)
                bar.update(len(losses))
                losses.clear()
                if should_evaluate:
                    progress.curve.append({"step": progress.step, **evaluate()})
                if should_save and not interrupt:
                    save()
                started = time.perf_counter()
    if interrupt:  # also in the last step: measuring comes after it
        raise Interrupted(save(), interrupt[0])


def _backward(
    runner: ModelRunner,
    setup: TrainingSetup,
    scaler: torch.amp.GradScaler,
    data: EncodedExamples,
    indices: list[int],
    most: int,
) -> Tensor:
    """Compute the gradients of the mean loss of some rows, ``most`` at a time; returns the loss."""
    total: Tensor | None = None
    for batch, share in runner.parts(data, indices, most):
        loss = runner.loss(batch)[0] * share
        penalty = setup.penalty() if total is None and setup.penalty is not None else 0.0
        scaler.scale(loss + penalty).backward()
        total = loss.detach() if total is None else total + loss.detach()
    return total


def _read_losses(losses: list[Tensor], progress: Progress) -> None:
    """Move losses from the device into ``progress``; this waits for the device."""
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            step = progress.step - len(values) + i + 1
            raise NonFiniteLossError(f"the loss is {value} at step {step}")
    progress.losses += values
