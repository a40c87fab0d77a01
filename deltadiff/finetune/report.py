"""What a run reports: the entries of result.json about its course, and its closing lines."""

import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from ..devices import commit
from ..layers.report import swap_report
from ..ops import info
from .checkpoints import Progress
from .inputs import RunInputs


def course(inputs: RunInputs, model: nn.Module, progress: Progress, step_size: int) -> dict:
    """The entries about the course of a run and what it cost.

    Rates come from the median step, because the first steps compile and warm up.
    """
    median = statistics.median(progress.step_seconds)
    report = swap_report(model)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    labels = Counter(e.label for e in inputs.heldout.examples if e.label)
    return {
        "examples": {"train": len(inputs.train), "heldout": len(inputs.heldout)},
        "labels": dict(sorted(labels.items())),
        "parameters": sum(n for n, _ in parameters),
        "trainable_parameters": sum(n for n, trained in parameters if trained),
        "paths": dict(Counter(row.path for row in report.rows)),
        "loss_curve": progress.losses,
        "seconds": sum(progress.step_seconds),
        "seconds_per_step": median,
        "examples_per_second": step_size / median,
        "tokens_per_second": progress.tokens / progress.step / median,
    }


def environment(device: torch.device) -> dict:
    """Versions, device, commit and command: what is needed to get the same figures again."""
    found = info.collect()
    return {
        "versions": found["versions"],
        "device": next(d for d in found["devices"] if torch.device(d["device"]) == device),
        "commit": commit(),
        "command": sys.argv,
    }


def describe(measured: dict[str, float]) -> str:
    """Held-out metrics in words."""
    names = {"nll_per_token": "negative log-likelihood a token"}
    return ", ".join(f"{names.get(k, k)} {v:.4g}" for k, v in measured.items()) + " (held out)"


def summary(result: dict) -> str:
    """The closing lines of a run, from what result.json holds."""
    update, peak = result["weight_update"], result["peak_memory_mib"]
    lines = [
        f"after:  {describe(result['after']) if result['after'] else 'not measured'}",
        f"{result['settings']['steps']} steps in {result['seconds']:.1f} s: "
        f"{result['examples_per_second']:.1f} examples/s, "
        f"{result['tokens_per_second']:.0f} tokens/s; "
        f"peak memory {'not known' if peak is None else f'{peak:.0f} MiB'} above the loaded model",
    ]
    if update:
        lines.append(
            f"{update['share']:.1%} of the wanted update is in W (a change by {update['size']:.2%})"
        )
        if update["error"] > 0.01:
            lines.append(
                f"W was rounded in each step and is {update['error']:.1%} of the update away from "
                "the adapter, which holds all of it: what was saved is what was measured"
            )
    lines += [f"{name} failed: {why}" for name, why in result["failed"].items()]
    lines += [f"without {name}: {why}" for name, why in result["metrics_left_out"].items()]
    output = Path(result["settings"]["output"])
    lines.append(f"in {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    return "\n".join(lines)
