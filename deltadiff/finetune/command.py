"""`deltadiff finetune`: fine-tune a real model on real text, measured before and after.

Text with labels trains a classifier or a regression, and questions whose answers are spans of a
text train a model that finds them (an encoder or a decoder with a new linear head); other text
trains a causal language model. The output folder holds result.json, settings.json, predictions.csv
(and completions.csv), what was trained, figures of the loss, the metrics and the similarity of
weights, and while a run lasts its latest checkpoint.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from ..checks import NAMED_DTYPES
from ..devices import default_device, find_device
from ..errors import ArgumentError, Interrupted, NonFiniteLossError
from ..files import write_json
from . import diffora_stage as search_stage
from . import presets, report
from . import question_answering as spans
from .data import encode, find_kind, read_examples, split_examples
from .generation import complete
from .methods import METHODS
from .metrics import score, score_text
from .models import load_model
from .packages import check_packages
from .plots import plot_loss, plot_metric_curve, plot_similarity
from .settings import Settings, given_settings, make_settings, read_settings
from .settings import add_arguments as add_settings
from .training import (
    FirstStage,
    ModelRunner,
    PeakMemory,
    Progress,
    Task,
    find_checkpoints,
    load_checkpoint,
    predict,
    save_checkpoint,
    train,
)

# --------------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff finetune`. Those not given stay out of the namespace."""
    add_settings(parser)
    parser.add_argument("--resume", metavar="OUTPUT", help="go on with the run in this folder")
    parser.add_argument("--eager", action="store_true", help="short for --method lora-peft")
    parser.add_argument("--show", action="store_true", help="print what --preset sets, and stop")


def run(args: argparse.Namespace) -> int:
    """The command: 0; 1 if training failed; 2 for input that cannot be used; 130 when stopped."""
    check_packages()
    try:
        if args.show:
            print(presets.describe(getattr(args, "preset", "") or ""))
            return 0
        settings = settings_from(args)
        print(report.summary(finetune(settings, resume=args.resume is not None)))
        return 0
    except Interrupted as stop:
        print(f"stopped; saved in {stop}\nto go on: deltadiff finetune --resume {settings.output}")
        return 130
    except KeyboardInterrupt:
        print("stopped; there was nothing to save")
        return 130
    except ArgumentError as error:
        print(f"deltadiff finetune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, torch.OutOfMemoryError, OSError) as error:
        print(f"deltadiff finetune: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def settings_from(args: argparse.Namespace) -> Settings:
    given = given_settings(args)
    if args.resume is not None:
        if given:
            first = next(iter(given))
            raise ArgumentError("resume", f"also {first}={given[first]}", "--resume OUTPUT alone")
        return read_settings(Path(args.resume))
    for name in ("model", "data"):
        if name not in given:
            raise ArgumentError(
                name, "nothing", "deltadiff finetune MODEL DATA, or --resume OUTPUT"
            )
    if args.eager:
        if given.get("method", "lora") not in ("lora", "lora-peft"):
            raise ArgumentError("eager", f"method {given['method']}", "lora, which PEFT has")
        given["method"] = "lora-peft"
    return make_settings(given)


# ------------------------------------------------------------------------------ run


def device_of(settings: Settings) -> torch.device:
    """The device that a run is on."""
    return find_device(default_device() if settings.device == "auto" else settings.device)


def load_task(settings: Settings) -> Task:
    """Read the text and the model; both come out the same every time.

    Raises:
        ArgumentError: see `read_examples`, `load_model`, `encode`.
    """
    settings.check()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    device = device_of(settings)
    examples = read_examples(settings.data, settings.columns, settings.format)
    try:
        share = float(settings.heldout)
    except ValueError:
        heldout = read_examples(settings.heldout, settings.columns, settings.format)
    else:
        examples, heldout = split_examples(examples, share, settings.seed)
    dtype = NAMED_DTYPES[settings.dtype]
    kind, labels = find_kind(examples, settings.regression)
    if kind != "text" and settings.generate:
        raise ArgumentError("generate", settings.generate, "0 for text with labels or answers")
    model = load_model(settings.model, kind, labels, dtype=dtype, seed=settings.seed)
    for head in model.head:
        model.module.get_submodule(head).float()  # trained whole, so 16 bits are too few
    model.module.to(device)
    parts = [
        spans.encode(part, model, settings.max_length, settings.doc_stride)
        if kind == "span"
        else encode(part, model, settings.max_length)
        for part in (examples, heldout)
    ]
    return Task(model, *parts, heldout, device, dtype)


def finetune(settings: Settings, *, resume: bool = False, export: bool = True) -> dict:
    """Fine-tune and write the results into ``settings.output``; returns what result.json holds.

    ``export=False`` keeps the results but not the weights.

    Raises:
        ArgumentError: settings, text or a model that cannot be used; a folder that holds a run.
        NonFiniteLossError, Interrupted: see `train`.
    """
    output = Path(settings.output)
    if resume and (output / "result.json").exists():
        raise ArgumentError("resume", f"{output}, a finished run", "a run that was interrupted")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError("output", output, f"a new folder, or --resume {output} to go on")
    task = load_task(settings)
    if settings.epochs is not None:
        steps = math.ceil(settings.epochs * len(task.train) / settings.batch_size)
        settings = dataclasses.replace(settings, steps=steps)
    memory = PeakMemory(task.device)
    prepared = METHODS[settings.method].prepare(task, settings)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "settings.json", asdict(settings))
    if isinstance(prepared, FirstStage):
        memory.reset()
        prepared = prepared.run(output)
        prepared.about["search"]["peak_memory_mib"] = memory.read()

    forward = ModelRunner(prepared.module, task.device, task.dtype, settings.label_smoothing)
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.dtype == torch.float16)
    optimizer = prepared.optimizer

    def evaluate() -> dict[str, float]:
        with prepared.evaluating():
            rows = predict(forward, task.heldout, settings.measured_at_once)
        return score(rows, task.heldout)[0]

    checkpoints = find_checkpoints(output) if resume else []
    if checkpoints:
        progress = load_checkpoint(checkpoints[-1], optimizer, scaler, prepared.load)
        print(f"going on after step {progress.step} of {settings.steps}")
    else:
        progress = Progress(before=evaluate())
        print("before: " + report.describe(progress.before), flush=True)
        torch.manual_seed(settings.seed)  # dropout; a checkpoint restores it
    memory.reset()
    train(
        forward, optimizer, scaler, task.train, progress, penalty=prepared.penalty, lr=settings.lr,
        warmup=settings.warmup, steps=settings.steps, batch_size=settings.batch_size,
        seed=settings.seed, save_every=settings.save_every,
        save=lambda: save_checkpoint(output, progress, optimizer, scaler, prepared.save),
        evaluate_every=settings.evaluate_every, evaluate=evaluate,
    )  # fmt: skip
    peak = memory.read()
    with prepared.evaluating():
        measured = _measure(forward, task, settings)
        if export:
            prepared.write(output)
    result = {
        "settings": asdict(settings),
        **report.training(task, prepared.module, progress, settings.batch_size),
        "before": progress.before,
        "metric_curve": progress.curve,
        **measured,
        **prepared.about,
        "peak_memory_mib": peak,
        "environment": report.environment(task.device),
    }
    title = f"Fine-tuning {Path(settings.model).name} on {Path(settings.data).name}"
    plot_loss(output / "loss.png", {settings.method: result}, title)
    if progress.curve:
        plot_metric_curve(output / "metrics.png", progress.before, progress.curve, title)
    if result["similarity"]:
        plot_similarity(output / "similarity.png", result["similarity"], title)
    write_json(output / "result.json", result)
    for folder in find_checkpoints(output):
        shutil.rmtree(folder)
    (output / search_stage.FILE).unlink(missing_ok=True)
    return result


def _measure(forward: ModelRunner, task: Task, settings: Settings) -> dict:
    """The entries of result.json about the trained model; writes what it said on held-out text."""
    output = Path(settings.output)
    rows = predict(forward, task.heldout, settings.measured_at_once)
    report.write_predictions(output / "predictions.csv", rows, task)
    after, left_out = score(rows, task.heldout)
    if settings.generate:
        names = ("num_beams", "length_penalty", "no_repeat_ngram_size", "max_new_tokens")
        completions = complete(
            forward, task.model.tokenizer, task.heldout_examples, most=settings.generate,
            batch_size=settings.measured_at_once,
            **{name: getattr(settings, name) for name in names},
        )  # fmt: skip
        report.write_completions(output / "completions.csv", completions)
        written = score_text([c.text for c in completions], [c.references for c in completions])
        after, left_out = after | written[0], left_out | written[1]
    module = task.model.module  # the same one, under its own names
    original = load_model(
        settings.model, task.model.kind, task.model.labels, dtype=task.dtype, seed=settings.seed
    ).module
    return {
        "after": after,
        "metrics_left_out": left_out,
        "weight_update": report.weight_update(module, original),
        "similarity": report.similarity(module, original),
    }
