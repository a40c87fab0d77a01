"""Comparisons with tuned learning rates whose runs are made up, for the tests of `--tune-lr`."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from deltadiff.errors import NonFiniteLossError
from deltadiff.files import write_sealed_json
from deltadiff.finetune.run import RESULT_FILE
from deltadiff.finetune.run_inputs import note_inputs

EXAMPLES = 40
# The share of right answers of each method at its best rate, and that rate.
SKILLS = {"lora": (0.70, 0.01), "delta-lora": (0.95, 0.003)}


def result(settings, share: float) -> dict:
    """What result.json holds of a run that has this share of its answers right."""
    draw = np.random.default_rng([settings.seed, round(1e6 * settings.lr)])
    labels = [i % 2 for i in range(EXAMPLES)]
    right = draw.permutation(EXAMPLES) < round(share * EXAMPLES)
    answers = [[y, y if r else 1 - y, 0.1] for y, r in zip(labels, right, strict=True)]
    return {
        "settings": dataclasses.asdict(settings), "after": {"accuracy": float(right.mean())},
        "before": {"accuracy": 0.5}, "answers": answers, "completion_counts": [],
        "metrics_left_out": {}, "failed": {},
        "trainable_parameters": 10, "seconds": 1.0, "seconds_per_step": 0.1,
        "peak_memory_mib": None, "weight_update": None, "similarity": {}, "loss_curve": [1.0],
    }  # fmt: skip


class Finetune:
    """Stands for `finetune`: a method is the worse, the further its rate is from its best one.

    ``ran`` has the settings of each call. A run at ten times the best rate has a loss of NaN.
    """

    def __init__(self) -> None:
        self.ran: list = []

    def __call__(self, settings, **more) -> dict:
        self.ran.append(settings)
        share, best = SKILLS[settings.method]
        off = abs(math.log10(settings.lr / best))
        if off >= 0.99:
            raise NonFiniteLossError("the loss is nan at step 3")
        found = result(settings, share - 0.6 * off)
        folder = Path(settings.output)
        folder.mkdir(parents=True)
        note_inputs(folder, settings)
        write_sealed_json(folder / RESULT_FILE, found)
        return found
