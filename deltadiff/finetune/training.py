"""The loop of `deltadiff finetune`: steps, evaluation, checkpoints, and what they cost."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from ..errors import Interrupted, NonFiniteLossError
from ..files import _sync, reading
from ..loop import LOSS_SYNC_INTERVAL, batch_indices, catch_interrupt, rng_states, set_rng_states
from . import question_answering as spans
from .data import IGNORED, Encoded, Example
from .models import Model


@dataclass
class Progress:
    """What a run has done so far; a checkpoint holds it as JSON."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    before: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)  # held-out, and "step"


@dataclass(frozen=True)
class Task:
    """What a run trains on and is measured on.

    ``dtype`` is that of the frozen weights and of the products.
    """

    model: Model
    train: Encoded
    heldout: Encoded
    heldout_examples: list[Example]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class TrainingSetup:
    """What a method made of a model: what is trained, what trains it, and how it is kept.

    Attributes:
        optimizer: of all that is trained.
        save, load: write what was trained into a folder, and put it back.
        penalty: added to the training loss, differentiable; None for none.
        evaluating: a context in which the model is as it will be used.
        keep: writes the finished model into a folder, where that is not what ``save`` writes.
        about: more entries for result.json.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    penalty: Callable[[], Tensor] | None = None
    evaluating: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    keep: Callable[[Path], object] | None = None
    about: dict[str, object] = field(default_factory=dict)

    def write(self, output: Path) -> None:
        """The finished model, into the output folder."""
        if self.keep is None:
            self.save(output / "adapter")
        else:
            self.keep(output / "model")


@dataclass(frozen=True)
class FirstStage:
    """A search that comes before; ``run`` takes the output folder, and tells of it in ``about``."""

    run: Callable[[Path], TrainingSetup]


# ----------------------------------------------------------------------------- loss


@dataclass(frozen=True)
class ModelRunner:
    """A model with the device and the dtype that its products run in.

    ``label_smoothing`` is for training only.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    label_smoothing: float = 0.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def loss(self, batch: dict[str, Tensor], reduction: str = "mean") -> tuple[Tensor, Tensor]:
        """(loss, logits); the loss is of a class, a number, a span, or of every next token."""
        labels = batch["labels"]
        smoothing = self.label_smoothing if self.model.training else 0.0
        with self.autocast():
            out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if "context" in batch:
            logits = torch.stack([out.start_logits, out.end_logits], dim=-1).float()
            return spans.loss(logits, labels, reduction, smoothing), logits
        logits = out.logits.float()
        if labels.is_floating_point():
            return mse_loss(logits.squeeze(-1), labels, reduction=reduction), logits
        if labels.dim() == 2:  # each token's logits are about the next one
            labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        loss = cross_entropy(
            logits.flatten(0, -2), labels.flatten(), reduction=reduction, ignore_index=IGNORED,
            label_smoothing=smoothing,
        )  # fmt: skip
        return (loss.view_as(labels) if reduction == "none" else loss), logits


@torch.no_grad()
def predict(forward: ModelRunner, data: Encoded, batch_size: int) -> Tensor:
    """A row an example: what the head gives, or (negative log-likelihood, tokens).

    Of spans a row a window, see `spans.best`.
    """
    was_training = forward.model.training
    forward.model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))  # little padding
    rows = []
    for start in range(0, len(order), batch_size):
        batch = data.batch(order[start : start + batch_size], forward.device)
        loss, logits = forward.loss(batch, reduction="none")
        if loss.dim() == 2:
            counted = batch["labels"][:, 1:] != IGNORED
            rows.append(torch.stack([loss.sum(1), counted.sum(1)], dim=1).cpu())
        elif "context" in batch:
            rows.append(spans.best(loss, logits, batch["context"]).cpu())
        else:
            rows.append(logits.cpu())
    forward.model.train(was_training)
    return torch.cat(rows)[torch.tensor(order).argsort()]


# ------------------------------------------------------------------------- training


def learning_rate(lr: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear decay to 0."""
    warmup = max(1, min(warmup, steps))
    return lr * min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def train(
    forward: ModelRunner,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    data: Encoded,
    progress: Progress,
    *,
    penalty: Callable[[], Tensor] | None = None,
    lr: float,
    warmup: int,
    steps: int,
    batch_size: int,
    seed: int,
    save_every: int,
    save: Callable[[], object],
    evaluate_every: int = 0,
    evaluate: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train from ``progress.step`` to ``steps``; calls ``save`` now and then and when interrupted.

    ``evaluate`` gives what ``progress.curve`` gets every so many steps (0: never).

    Raises:
        NonFiniteLossError, Interrupted.
    """
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    read_every = 1 if forward.device.type == "cpu" else LOSS_SYNC_INTERVAL
    forward.model.train()
    losses: list[Tensor] = []  # of the steps since the last look
    with (
        catch_interrupt() as interrupt,
        tqdm(
            total=steps, initial=progress.step, unit="step", mininterval=0.2 if on_terminal else 15
        ) as bar,
    ):
        started = time.perf_counter()
        while progress.step < steps and not interrupt:
            indices = batch_indices(len(data), batch_size, seed, progress.step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(lr, progress.step, steps, warmup)
            loss, _ = forward.loss(data.batch(indices, forward.device))
            total = loss if penalty is None else loss + penalty()
            scaler.scale(total).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            progress.step += 1
            progress.tokens += sum(len(data.ids[i]) for i in indices)
            saves = progress.step % save_every == 0 and progress.step < steps
            looks = evaluate_every and progress.step % evaluate_every == 0
            ends = interrupt or progress.step == steps
            if len(losses) == read_every or saves or looks or ends:
                _read_losses(losses, progress)
                seconds = time.perf_counter() - started
                progress.step_seconds += [seconds / len(losses)] * len(losses)
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", refresh=False)
                bar.update(len(losses))
                losses.clear()
                if looks:
                    progress.curve.append({"step": progress.step, **evaluate()})
                if saves and not interrupt:
                    save()
                started = time.perf_counter()
    if interrupt and progress.step < steps:
        raise Interrupted(save())


def _read_losses(losses: list[Tensor], progress: Progress) -> None:
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            step = progress.step - len(values) + i + 1
            raise NonFiniteLossError(f"the loss is {value} at step {step}")
    progress.losses += values


class PeakMemory:
    """Memory above what was in use at the start, in MiB: of the GPU, or resident on Linux."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start = self._now()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> float | None:
        """None where the system does not tell."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.start) / 2**20
        peak = self._status("VmHWM")
        return None if peak is None or self.start is None else (peak - self.start) / 2**20

    def _now(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def _status(self, key: str) -> int | None:
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(f"{key}:"):
                    return int(line.split()[1]) * 1024
        return None


# ---------------------------------------------------------------------- checkpoints


def save_checkpoint(
    output: Path,
    progress: Progress,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    save_weights: Callable[[Path], object],
) -> Path:
    """Write ``output/checkpoint-STEP`` whole or not at all, then drop the earlier ones."""
    target = output / f"checkpoint-{progress.step}"
    temporary = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=output))
    try:
        save_weights(temporary / "adapter")
        state = {
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            **rng_states(),
        }
        torch.save(state, temporary / "state.pt")
        (temporary / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))
        for file in temporary.rglob("*"):
            _sync(file)
        if target.exists():  # the same step, saved before an interrupt
            shutil.rmtree(target)
        os.replace(temporary, target)
        _sync(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for other in find_checkpoints(output)[:-1]:
        shutil.rmtree(other)
    return target


def find_checkpoints(output: Path) -> list[Path]:
    """Checkpoints of a run, the latest last."""
    found = [p for p in output.glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def load_checkpoint(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    load_weights: Callable[[Path], object],
) -> Progress:
    """Restore what `save_checkpoint` wrote; nothing in it is unpickled but tensors.

    Raises:
        CheckpointError: a part is missing or garbled.
    """
    with reading(folder, "a checkpoint of this run"):
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        load_weights(folder / "adapter")
        optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    set_rng_states(state)
    return progress
