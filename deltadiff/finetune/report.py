"""What `deltadiff finetune` writes down: result.json, predictions.csv and the closing lines."""

import copy
import csv
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from ..devices import commit
from ..layers.lora_linear import lora_layers
from ..layers.report import swap_report
from ..ops import info
from . import question_answering as spans
from .generation import Completion
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
    """Of what in-place Delta-LoRA wanted to add, lambda s (B_T A_T - B_k A_k), the share in W.

    share: <W_T - W_0, D> / <D, D> over all layers, D being that; size: |D| / |W_0|. None for other
    methods.
    """
    reached = wanted = before = 0.0
    for name, layer in lora_layers(model).items():
        delta = layer.delta
        if delta is None or not delta.in_weight or not delta.started():
            continue
        products = [p for p in delta.past_updates or () if p.in_weight]
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


@torch.no_grad()
def similarity(model: nn.Module, original: nn.Module) -> dict[str, dict[str, float]]:
    """Cosine similarity of fine-tuned and original weights (Delta-LoRA's figure 3).

    By the place of a linear layer in its block, then by block; places that no block changed are
    left out. A fine-tuned weight is what the layer, in float32 and without its bias, does to the
    identity: that has the low-rank branch in it, whatever its form.
    """
    found: dict[str, dict[str, float]] = {}
    changed = set()
    for name, layer in original.named_modules():
        place = re.fullmatch(r"\D*?\.(\d+)\.(.+)", name)
        weight = getattr(layer, "weight", None)
        if place is None or weight is None or weight.dim() != 2 or isinstance(layer, nn.Embedding):
            continue
        before = weight.T if isinstance(layer, nn.Linear) else weight  # GPT-2's Conv1D: (in, out)
        now = copy.deepcopy(model.get_submodule(name)).float().eval()
        for parameter, p in now.named_parameters():
            if parameter.rpartition(".")[2] == "bias":
                p.zero_()
        after = now(torch.eye(len(before), device=next(now.parameters()).device)).double()
        before = before.to(after)
        if not torch.equal(after, before):
            changed.add(place[2])
        cosine = (after * before).sum() / (after.norm() * before.norm())
        found.setdefault(place[2], {})[place[1]] = cosine.item()
    return {kind: blocks for kind, blocks in found.items() if kind in changed}


def environment(device: torch.device) -> dict:
    """Versions, device and commit: what someone needs to get the same figures."""
    found = info.collect()
    return {
        "versions": found["versions"],
        "device": next(d for d in found["devices"] if torch.device(d["device"]) == device),
        "commit": commit(),
        "command": sys.argv,
    }


def write_predictions(path: Path, rows: Tensor, task: Task) -> None:
    """A line a held-out example: the answer and logits, or (negative log-likelihood, tokens)."""
    kind, labels = task.model.kind, task.model.labels
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if kind == "span":
            writer.writerow(["question", "predicted", "answers"])
            answers = spans.answers(rows, task.heldout)
            for example, answer in zip(task.heldout_examples, answers, strict=True):
                right = "\n".join(text for text, _ in example.answers)
                writer.writerow([example.prompt, answer, right])
            return
        columns = ["label", "predicted", *(f"logit {name}" for name in labels)]
        writer.writerow(["text", *(["nll", "tokens"] if kind == "text" else columns)])
        for example, row in zip(task.heldout_examples, rows.tolist(), strict=True):
            names = [] if kind == "text" else [example.label]
            names += [labels[row.index(max(row))]] if labels else []
            writer.writerow([example.text, *names, *row])


def write_completions(path: Path, completions: list[Completion]) -> None:
    """A line a prompt: what the model wrote, and the references."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "references"])
        for c in completions:
            writer.writerow([c.prompt, c.text, "\n".join(c.references)])


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
    lines += [f"without {name}: {why}" for name, why in result["metrics_left_out"].items()]
    output = Path(result["settings"]["output"])
    lines.append(f"in {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    return "\n".join(lines)
