"""What a run measures when its training is over and the trained model is on the disk.

Each part is measured by itself: where one fails, the reason stands in its place in result.json,
and the others go on. A method that says how to read back what it wrote is measured by that, on a
fresh base model: the metrics are those of the files, as everybody gets them.
"""

import contextlib
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import nn

from ..files import write_csv
from .generation import complete, write_completions
from .inputs import RunInputs
from .metrics import bleu_counts, score_text
from .models import load_model
from .runner import ModelRunner
from .settings import Settings
from .weight_change import similarity, weight_update


@dataclass
class Measured:
    """What was measured: entries of result.json, and why others could not be."""

    after: dict[str, float] = field(default_factory=dict)
    metrics_left_out: dict[str, str] = field(default_factory=dict)
    answers: list[list[float]] = field(default_factory=list)  # see `Task.answers`; [] if not finite
    completion_counts: list[list[int]] = field(default_factory=list)  # see `bleu_counts`
    weight_update: dict | None = None
    similarity: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A block whose failure is noted, and ends nothing but the block."""
        try:
            yield
        except Exception as error:  # whatever it is, it must not cost the rest of the results
            words = f"{type(error).__name__}: {error}"
            self.failed[name] = textwrap.shorten(words, 300, placeholder=" ...")

    def add(self, metrics: dict[str, float], left_out: dict[str, str]) -> None:
        """Take over metrics; JSON has no inf and no NaN."""
        self.after |= finite(metrics)
        self.metrics_left_out |= left_out
        for name in metrics.keys() - self.after.keys():
            self.metrics_left_out[name] = f"it is {metrics[name]}"


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def measure_weights(
    measured: Measured, module: nn.Module, inputs: RunInputs, settings: Settings
) -> nn.Module | None:
    """Measure how far a trained model moved from its base; returns the base, on the CPU."""
    base = None
    with measured.part("loading the base model again"):
        base = load_model(
            settings.model, inputs.model.task, dtype=inputs.dtype, seed=settings.seed,
            four_bit=inputs.device if settings.load_in_4bit else None,
        ).module  # fmt: skip
    if base is not None:
        with measured.part("weight_update"):
            measured.weight_update = weight_update(module, base)
        with measured.part("similarity"):
            measured.similarity = similarity(module, base)
    return base


def measure_answers(
    measured: Measured, runner: ModelRunner, inputs: RunInputs, settings: Settings
) -> None:
    """Measure what a model answers on held-out text.

    The answers go to predictions.csv and completions.csv.
    """
    output, task, data = Path(settings.output), runner.task, inputs.heldout
    rows = None
    with measured.part("metrics"):
        rows = runner.predict(data, settings.measured_at_once)
        measured.add(*task.score(rows, data))
        answers = task.answers(rows, data)
        if all(map(math.isfinite, chain.from_iterable(answers))):  # JSON has nothing else
            measured.answers = answers
        else:
            measured.metrics_left_out["answers"] = "some are inf or NaN"
    if rows is not None:
        with measured.part("predictions.csv"):
            write_csv(output / "predictions.csv", task.predictions(rows, data))
    if settings.generate:
        with measured.part("generation"):
            completions = complete(runner, inputs.model.tokenizer, data.examples, settings)
            write_completions(output / "completions.csv", completions)
            texts, references = [c.text for c in completions], [c.references for c in completions]
            measured.add(*score_text(texts, references))
            measured.completion_counts = bleu_counts(texts, references)
