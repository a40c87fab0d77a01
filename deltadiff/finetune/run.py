"""`finetune`: one run, from settings to the results in its output folder."""

import dataclasses
import math
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from ..errors import ArgumentError
from ..files import as_folder, write_csv, write_json
from . import report
from .checkpoints import Progress, find_checkpoints, load_checkpoint, save_checkpoint
from .generation import complete, write_completions
from .inputs import RunInputs, load_inputs
from .memory import PeakMemory
from .methods.diffora import SEARCH_STATE
from .methods.table import METHODS
from .metrics import score_text
from .models import load_model
from .plots import plot_loss, plot_metric_curve, plot_similarity
from .runner import ModelRunner
from .settings import Settings
from .task_file import write_task
from .training import train
from .training_setup import ADAPTER, FirstStage
from .weight_change import similarity, weight_update


def finetune(settings: Settings, *, resume: bool = False, export: bool = True) -> dict:
    """Fine-tune and write the results into ``settings.output``; returns what result.json holds.

    Args:
        settings: what to do.
        resume: go on with the run in the output folder.
        export: write the weights too, and not only the results.

    Raises:
        ArgumentError: settings, text or a model that cannot be used; a folder that holds a run.
        NonFiniteLossError, Interrupted: see `train`.
    """
    output = as_folder("output", settings.output)
    if resume and (output / "result.json").exists():
        raise ArgumentError("resume", f"{output}, a finished run", "a run that was interrupted")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError("output", output, f"a new folder, or --resume {output} to go on")
    inputs = load_inputs(settings)
    task = inputs.model.task
    if settings.epochs is not None:
        steps = math.ceil(settings.epochs * len(inputs.train) / settings.step_size)
        settings = dataclasses.replace(settings, steps=steps)
    memory = PeakMemory(inputs.device)
    setup = METHODS[settings.method].prepare(inputs, settings)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "settings.json", asdict(settings))
    if isinstance(setup, FirstStage):
        memory.reset()
        setup = setup.run(output)
        setup.about["search"]["peak_memory_mib"] = memory.read()

    runner = ModelRunner(setup.module, task, inputs.device, inputs.dtype, settings.label_smoothing)
    scaler = torch.amp.GradScaler(inputs.device.type, enabled=inputs.dtype == torch.float16)

    def evaluate() -> dict[str, float]:
        rows = runner.predict(inputs.heldout, settings.measured_at_once)
        return task.score(rows, inputs.heldout)[0]

    checkpoints = find_checkpoints(output) if resume else []
    if checkpoints:
        progress = load_checkpoint(checkpoints[-1], setup, scaler)
        print(f"going on after step {progress.step} of {settings.steps}")
    else:
        progress = Progress(before=evaluate())
        print("before: " + report.describe(progress.before), flush=True)
        torch.manual_seed(settings.seed)  # for dropout; a checkpoint restores the state instead
    memory.reset()
    train(
        runner, setup, scaler, inputs.train, progress, settings,
        save=lambda: save_checkpoint(output, progress, setup, scaler), evaluate=evaluate,
    )  # fmt: skip
    peak = memory.read()
    if export:  # first of all: what was trained must not be lost where measuring fails
        folder = setup.write(output)
        if folder.name == ADAPTER:
            template = inputs.model.tokenizer.chat_template if settings.chat_template else None
            write_task(folder, task, template)
    measured = _measure(runner, inputs, settings)
    result = {
        "settings": asdict(settings),
        "skipped": inputs.skipped.counts,
        "cut": {"train": inputs.train.cut, "heldout": inputs.heldout.cut},
        **report.course(inputs, setup.module, progress, settings.step_size),
        "before": progress.before,
        "metric_curve": progress.curve,
        **measured,
        **setup.about,
        "peak_memory_mib": peak,
        "environment": report.environment(inputs.device),
    }
    title = f"Fine-tuning {Path(settings.model).name} on {Path(settings.data).name}"
    plot_loss(output / "loss.png", {settings.method: result}, title, task)
    if progress.curve:
        plot_metric_curve(output / "metrics.png", progress.before, progress.curve, title)
    if result["similarity"]:
        plot_similarity(output / "similarity.png", result["similarity"], title)
    write_json(output / "result.json", result)
    for folder in find_checkpoints(output):
        shutil.rmtree(folder)
    (output / SEARCH_STATE).unlink(missing_ok=True)
    return result


def _measure(runner: ModelRunner, inputs: RunInputs, settings: Settings) -> dict:
    """The entries of result.json about the trained model.

    What the model answered on held-out text goes to predictions.csv and completions.csv.
    """
    output, task, data = Path(settings.output), inputs.model.task, inputs.heldout
    rows = runner.predict(data, settings.measured_at_once)
    write_csv(output / "predictions.csv", task.predictions(rows, data))
    after, left_out = task.score(rows, data)
    if settings.generate:
        completions = complete(runner, inputs.model.tokenizer, data.examples, settings)
        write_completions(output / "completions.csv", completions)
        written = score_text([c.text for c in completions], [c.references for c in completions])
        after, left_out = after | written[0], left_out | written[1]
    module = inputs.model.module  # under its own names, which PEFT's wrapper changes
    original = load_model(
        settings.model, task, dtype=inputs.dtype, seed=settings.seed,
        four_bit=inputs.device if settings.load_in_4bit else None,
    ).module  # fmt: skip
    return {
        "after": after,
        "metrics_left_out": left_out,
        "weight_update": weight_update(module, original),
        "similarity": similarity(module, original),
    }
