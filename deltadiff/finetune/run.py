"""`finetune`: one run, from settings to the results in its output folder."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..devices import free_memory
from ..errors import ArgumentError
from ..files import as_folder, remove_leftovers, whole_folder, write_sealed_json
from . import report
from .checkpoints import (
    Checkpoint,
    Progress,
    open_latest,
    remove_checkpoints,
    save_checkpoint,
)
from .folder_lock import LOCK_FILE, locked
from .inputs import RunInputs, load_inputs, place_model
from .measuring import Measured, finite, measure_answers, measure_weights
from .memory import PeakMemory
from .methods.diffora import SEARCH_STATE
from .methods.table import METHODS
from .plots import plot_loss, plot_metric_curve, plot_similarity
from .run_inputs import INPUTS_FILE, SETTINGS_FILE, check_inputs, note_inputs
from .runner import ModelRunner
from .settings import Settings
from .task_file import write_task
from .tasks.base import Task
from .training import train
from .training_setup import ADAPTER, FirstStage, TrainingSetup

RESULT_FILE = "result.json"
# What a run writes into its folder under a temporary name first, as a regular expression.
_WRITTEN = r"checkpoint-\d+|adapter|model|search\.pt|\w+\.(json|csv|png)"


def finetune(
    settings: Settings,
    *,
    resume: bool = False,
    export: bool = True,
    accept_changes: bool = False,
) -> dict:
    """Fine-tune and write the results into ``settings.output``; returns what result.json holds.

    When the training is over, what was trained is written first. What fails after that, in
    measuring or drawing, is named in the entry "failed" and costs nothing else.

    Args:
        settings: what to do.
        resume: go on with the run in the output folder.
        export: write the weights too, and not only the results. The metrics are then those of the
            files, read back; without it, those of the model in memory.
        accept_changes: go on although settings, text or model are others than at the start.

    Raises:
        ArgumentError: settings, text or a model that cannot be used; a folder that holds a run, or
            in which one is at work; a run to resume that began with other inputs.
        NonFiniteLossError, Interrupted: see `train`.
    """
    output = as_folder("output", settings.output)
    with locked(output):
        remove_leftovers(output, _WRITTEN)
        if resume and (output / RESULT_FILE).exists():
            _remove_state(output)  # which a kill after the last line of the run may have left
            raise ArgumentError("resume", f"{output}, a finished run", "a run that was interrupted")
        if not resume and any(path.name != LOCK_FILE for path in output.iterdir()):
            raise ArgumentError("output", output, f"a new folder, or --resume {output} to go on")
        return _run(settings, output, export, accept_changes)


def _run(settings: Settings, output: Path, export: bool, accept_changes: bool) -> dict:
    """`finetune` in a folder of its own, which is empty or holds a run to go on with."""
    checkpoint = open_latest(output)
    begun = checkpoint is not None or any(
        (output / name).exists() for name in (INPUTS_FILE, SEARCH_STATE)
    )
    if begun:
        check_inputs(output, settings, accept_changes)
    inputs = load_inputs(settings)
    if settings.epochs is not None:
        steps = math.ceil(settings.epochs * len(inputs.train) / settings.step_size)
        settings = dataclasses.replace(settings, steps=steps)
    memory = PeakMemory(inputs.device)
    setup = METHODS[settings.method].prepare(inputs, settings)
    if not begun or accept_changes:
        note_inputs(output, settings)
    if isinstance(setup, FirstStage):
        memory.reset()
        setup = setup.run(output)
        setup.about["search"]["peak_memory_mib"] = memory.read()
    progress = _train(setup, inputs, settings, memory, checkpoint)
    peak = memory.read()

    measured, saved = Measured(), None
    if export:
        saved = _write_trained(setup, inputs, settings, measured)
    course = report.course(inputs, setup.module, progress, settings.step_size)
    about, figures = setup.about, setup.figures
    base = measure_weights(measured, setup.module, inputs, settings)
    runner: ModelRunner | None = _runner(setup, inputs, settings)
    if saved is not None and setup.read_back is not None:
        read, setup, runner = setup.read_back, None, None
        inputs.model.module = base  # the trained one is free now, if its memory is needed
        free_memory(inputs.device)
        if base is not None:
            with measured.part("reading back what was saved"):
                place_model(inputs.model, settings, inputs.device)
                read(base, saved)
                runner = ModelRunner(base, inputs.model.task, inputs.device, inputs.dtype)
    if runner is not None:
        measure_answers(measured, runner, inputs, settings)
    result = {
        "settings": asdict(settings),
        "skipped": inputs.skipped.counts,
        "cut": {"train": inputs.train.cut, "heldout": inputs.heldout.cut},
        **course,
        "before": progress.before,
        "metric_curve": progress.curve,
        **asdict(measured),
        **about,
        "peak_memory_mib": peak,
        "environment": report.environment(inputs.device),
    }
    _draw(result, inputs.model.task, measured, figures)
    result["failed"] = measured.failed
    write_sealed_json(output / RESULT_FILE, result)
    _remove_state(output)
    return result


def _train(
    setup: TrainingSetup,
    inputs: RunInputs,
    settings: Settings,
    memory: PeakMemory,
    checkpoint: Checkpoint | None,
) -> Progress:
    """Train from a checkpoint, or from the start, to the end."""
    runner = _runner(setup, inputs, settings)
    scaler = torch.amp.GradScaler(inputs.device.type, enabled=inputs.dtype == torch.float16)

    def evaluate() -> dict[str, float]:
        rows = runner.predict(inputs.heldout, settings.measured_at_once)
        return finite(runner.task.score(rows, inputs.heldout)[0])

    if checkpoint is not None:
        checkpoint.restore(setup, scaler)
        progress = checkpoint.progress
        print(f"going on after step {progress.step} of {settings.steps}")
    else:
        progress = Progress(before=evaluate())
        print("before: " + report.describe(progress.before), flush=True)
        torch.manual_seed(settings.seed)  # for dropout; a checkpoint restores the state instead
    memory.reset()
    train(
        runner, setup, scaler, inputs.train, progress, settings,
        save=lambda: save_checkpoint(Path(settings.output), progress, setup, scaler),
        evaluate=evaluate,
    )  # fmt: skip
    return progress


def _runner(setup: TrainingSetup, inputs: RunInputs, settings: Settings) -> ModelRunner:
    task, device = inputs.model.task, inputs.device
    return ModelRunner(setup.module, task, device, inputs.dtype, settings.label_smoothing)


def _write_trained(
    setup: TrainingSetup, inputs: RunInputs, settings: Settings, measured: Measured
) -> Path:
    """Write what was trained, whole or not at all; returns its folder."""
    target = Path(settings.output) / setup.kept_in
    with contextlib.ExitStack() as stack:
        # What is there is what this run wrote before it was stopped. Somebody's files may be in it.
        there = target.exists() and any(target.iterdir())
        folder = target if there else stack.enter_context(whole_folder(target))
        failed = setup.write(folder)
        if setup.kept_in == ADAPTER:
            template = inputs.model.tokenizer.chat_template if settings.chat_template else None
            write_task(folder, inputs.model.task, template)
    if failed is not None:
        measured.failed["adapter_format"] = failed
    return target


def _draw(
    result: dict, task: Task, measured: Measured, figures: Mapping[str, Callable[[Path], object]]
) -> None:
    """Draw the figures, each by itself."""
    settings, curve = result["settings"], result["metric_curve"]
    title = f"Fine-tuning {Path(settings['model']).name} on {Path(settings['data']).name}"
    losses = {settings["method"]: result}
    figures = {**figures, "loss.png": lambda path: plot_loss(path, losses, title, task)}
    if curve:
        figures["metrics.png"] = lambda path: plot_metric_curve(
            path, result["before"], curve, title
        )
    if result["similarity"]:
        figures["similarity.png"] = lambda path: plot_similarity(path, result["similarity"], title)
    for name, draw in figures.items():
        with measured.part(name):
            draw(Path(settings["output"]) / name)


def can_go_on(output: Path) -> bool:
    """Whether the folder holds a run that ``resume`` goes on with, from a state or from its start.

    One may ask while no run is at work in it.
    """
    return (output / SETTINGS_FILE).exists() and not (output / RESULT_FILE).exists()


def _remove_state(output: Path) -> None:
    """Remove what a run goes on from: it is finished."""
    remove_checkpoints(output)
    (output / SEARCH_STATE).unlink(missing_ok=True)
