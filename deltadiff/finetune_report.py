"""What `deltadiff finetune` writes down: result.json, predictions.csv and the closing lines."""

import csv
import json
import os
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from . import info
from .lora import lora_layers
from .swap import swap_report
from .training import Progress, Task


def training(task: Task, model: nn.Module, progress: Progress, batch_size: int) -> dict:
    """The course of a run and its cost.

    Rates come from the median step: the first steps compile and warm up.
    """
    median = statistics.median(progress.step_seconds)
    report = swap_report(model)
    parameters = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "examples": {"train": len(task.train), "heldout": len(task.heldout)},
        "labels": dict(sorted(Counter(e.label for e in task.heldout_examples if e.label).items())),
        "parameters": sum(n for n, _ in parameters),
        "trainable_parameters": sum(n for n, trained in parameters if trained),
        "paths": dict(Counter(row.path for row in report.rows)),
        "loss_curve": progress.losses,
        "seconds": sum(progress.step_seconds),
        "seconds_per_step": median,
        "examples_per_second": batch_size / median,
        "tokens_per_second": progress.tokens / progress.step / median,
    }


@torch.no_grad()
def weight_update(model: nn.Module, original: nn.Module) -> dict | None:
    """Of what Delta-LoRA wanted to add, D = lambda s (B_T A_T - B_k A_k), the share that is in W.

    share: <W_T - W_0, D> / <D, D> over all layers; size: |D| / |W_0|.
    """
    reached = wanted = before = 0.0
    for name, layer in lora_layers(model).items():
        delta = layer.delta
        if delta is None or not delta.started():
            continue
        products = [p for p in delta.folded or () if p.in_weight]
        products.append(delta.product(layer.lora_A, layer.lora_B, layer.scaling))
        d = sum(p.B.float() @ p.A.float() for p in products).double().cpu()
        w_0 = original.get_submodule(name).weight.double()
        w_0 = w_0.T if layer.transposed else w_0
        reached += ((layer.matrix.detach().double().cpu() - w_0) * d).sum().item()
        wanted += (d * d).sum().item()
        before += (w_0 * w_0).sum().item()
    if not wanted:
        return None
    return {"share": reached / wanted, "size": (wanted / before) ** 0.5}


def environment(device: torch.device) -> dict:
    """Versions, device and commit: what someone needs to get the same figures."""
    found = info.collect()
    return {
        "versions": found["versions"],
        "device": next(d for d in found["devices"] if torch.device(d["device"]) == device),
        "commit": info.commit(),
        "command": sys.argv,
    }


def write_json(path: Path, value: object) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_predictions(path: Path, rows: Tensor, task: Task) -> None:
    """A line a held-out example: logits of each class, or (negative log-likelihood, tokens)."""
    labels = task.model.labels
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"logit {name}" for name in labels] if labels else ["nll", "tokens"]
        writer.writerow(["text", *(["label", "predicted"] if labels else []), *columns])
        for example, row in zip(task.heldout_examples, rows.tolist(), strict=True):
            names = [example.label, labels[row.index(max(row))]] if labels else []
            writer.writerow([example.text, *names, *row])


def describe(measured: dict[str, float]) -> str:
    """Held-out figures in words."""
    names = {"nll_per_token": "negative log-likelihood a token"}
    return ", ".join(f"{names.get(k, k)} {v:.4g}" for k, v in measured.items()) + " (held out)"


def summary(result: dict) -> str:
    """The closing lines of a run."""
    update, peak = result["weight_update"], result["peak_memory_mib"]
    lines = [
        f"after:  {describe(result['after'])}",
        f"{result['settings']['steps']} steps in {result['seconds']:.1f} s: "
        f"{result['examples_per_second']:.1f} examples/s, "
        f"{result['tokens_per_second']:.0f} tokens/s; "
        f"peak memory {'not known' if peak is None else f'{peak:.0f} MiB'} above the loaded model",
    ]
    if update:
        lines.append(
            f"{update['share']:.1%} of the wanted update is in W (a change by {update['size']:.2%})"
        )
    lines.append(
        f"in {result['settings']['output']}: result.json, loss.png, predictions.csv, adapter"
    )
    return "\n".join(lines)
