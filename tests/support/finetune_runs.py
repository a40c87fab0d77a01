"""Runs of `deltadiff finetune` inside the test process, and questions in SQuAD's format."""

import argparse
import json
import os
import signal

import torch

from deltadiff.finetune import command
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.inputs import RunInputs, load_inputs
from deltadiff.finetune.methods.table import METHODS
from deltadiff.finetune.runner import ModelRunner
from deltadiff.finetune.settings import Settings, make_settings
from deltadiff.finetune.training_setup import TrainingSetup

# Words for the command line: LoRA, both forms of Delta-LoRA, and PEFT's LoRA.
VARIANTS = {
    "lora": ["--method", "lora"],
    "inplace": ["--update-ratio", "0.5"],
    "factored": ["--update-ratio", "0.5", "--w-update", "factored"],
    "eager": ["--eager"],
}


def finetune(*words) -> int:
    """The exit code of `deltadiff finetune` with these words."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(w) for w in words]))


def train(model, data, output, *words, labels=True) -> dict:
    """What result.json holds after 150 steps, if ``words`` do not say otherwise."""
    columns = ["--label-column", "label"] if labels else []
    fixed = ["--steps", "150", "--lr", "0.01", "--start-step", "3", "--device", "cpu"]
    assert finetune(model, data, "--output", output, *columns, *fixed, *words) == 0
    return json.loads((output / "result.json").read_text())


def stop_at(monkeypatch, module, number: int) -> None:
    """Ctrl-C at the given call of the ``batch_indices`` that ``module`` has imported."""
    original, calls = module.batch_indices, []

    def indices(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(module, "batch_indices", indices)


def asked(prompt: str, text: str, *found: str) -> Example:
    """A question about a text, with its answers."""
    places = tuple((answer, text.index(answer)) for answer in found)
    return Example(text, prompt=prompt, group=text, answers=places)


def squad(*questions: Example) -> str:
    """SQuAD's JSON, with a paragraph for each question."""
    paragraphs = [
        {
            "context": e.text,
            "qas": [
                {
                    "id": str(i),
                    "question": e.prompt,
                    "answers": [{"text": text, "answer_start": at} for text, at in e.answers],
                }
            ],
        }
        for i, e in enumerate(questions)
    ]
    return json.dumps({"version": "1.1", "data": [{"title": "films", "paragraphs": paragraphs}]})


# ---------------------------------------------------------------------------- methods


def settings_for(method: str, model: str, data: str, **more) -> Settings:
    """Settings of 20 steps of a classifier at rank 4."""
    given = {"model": model, "data": data, "label_column": "label", "method": method, "r": 4}
    return make_settings(given | {"device": "cpu", "lr": 0.01, "steps": 20} | more)


def prepare(method: str, model: str, data: str, **more) -> tuple[RunInputs, TrainingSetup]:
    """What a run with `settings_for` trains, before it trains."""
    settings = settings_for(method, model, data, **more)
    inputs = load_inputs(settings)
    return inputs, METHODS[method].prepare(inputs, settings)


def trained_names(module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


def train_method(output, method: str, model: str, data: str, *words) -> dict:
    """What result.json holds after a run of a method with its default options."""
    fixed = ["--label-column", "label", "--device", "cpu", "--lr", "0.01", "--method", method]
    assert finetune(model, data, "--output", output, *fixed, *words) == 0
    return json.loads((output / "result.json").read_text())


def gradients(setup: TrainingSetup) -> dict[str, torch.Tensor]:
    """The gradients by name, which are then set to zero."""
    named = setup.module.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    setup.optimizer.zero_grad(set_to_none=True)
    return found


def runner_of(inputs: RunInputs, setup: TrainingSetup) -> ModelRunner:
    """What a run trains, in training mode."""
    setup.module.train()
    return ModelRunner(setup.module, inputs.model.task, inputs.device, inputs.dtype)


# ------------------------------------------------------------------ what a run leaves


def trained_bytes(output) -> dict[str, bytes]:
    """The files of the trained model in an output folder, by name."""
    folders = [output / name for name in ("adapter", "model") if (output / name).exists()]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(output)): p.read_bytes() for p in files}


TIMES = {"seconds", "seconds_per_step", "examples_per_second", "tokens_per_second"}
TIMES |= {"peak_memory_mib", "environment", "checksum"}


def without_times(result: dict) -> dict:
    """What result.json holds, but for what no two runs have in common."""
    found = {name: value for name, value in result.items() if name not in TIMES}
    found["settings"] = found["settings"] | {"output": ""}
    if "search" in found:
        found["search"] = {k: v for k, v in found["search"].items() if k not in TIMES}
    return found


def flip_a_bit(path, place: int, bit: int = 0) -> None:
    """Change one bit of a byte, whose place may count from the end."""
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1 << bit
    path.write_bytes(blob)
