"""`Settings`: everything that a fine-tuning run depends on. See `options` for the command line."""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path

from ..checks import NAMED_DTYPES, ROUNDINGS
from ..errors import ArgumentError, CheckpointError
from ..files import reading
from ..optim.delta_lora import W_UPDATES
from .data.formats import FORMATS
from .data.layout import Layout, is_column
from .methods.table import ADAPTER_FORMATS, METHODS
from .presets import find_preset

EXCLUSIVE = (("steps", "epochs"), ("warmup_steps", "warmup_ratio"))  # at most one of each pair


def _group(title: str):
    """A function that makes fields of `Settings`, with their place and text in ``--help``.

    Its keywords: ``type``, that of a value, if the default does not tell it; ``choices``.
    """

    def option(default, text: str, **rest):
        return field(default=default, metadata={"group": title, "help": text, **rest})

    return option


_text = _group("model and text")
_method = _group("method")
_diffora = _group("DiffoRA")
_training = _group("training")
_scores = _group("generated text")
_run = _group("run")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on.

    ``model`` and ``data`` are the names that `load_model` and `read_examples` take. All others are
    options of the command line, with the help text that stands here.
    """

    model: str
    data: str
    output: str = _run("finetune-output", "new or empty folder for the results")
    preset: str | None = _run(
        None, "start from the values of a paper's table; `deltadiff presets` lists them"
    )
    text_column: str | None = _text(
        None,
        "column with the text or the messages (default: text, messages or conversations, or "
        "Alpaca's instruction, input and output)",
    )
    label_column: str | None = _text(
        None, 'column with the class or number (default "none": train a language model)'
    )
    prompt_column: str | None = _text(
        None, "column with a prompt, which has no loss, or with the first of two sentences"
    )
    group_column: str | None = _text(None, "column with groups, which --heldout keeps whole")
    format: str | None = _text(
        None, "format of the files (default: by their ending)", choices=tuple(FORMATS)
    )
    delimiter: str | None = _text(
        None,
        'between the cells of a CSV file, such as ";" or "tab" (default: what its header shows)',
    )
    encoding: str | None = _text(
        None, "of text files, such as cp1252 (default: that of the byte order mark, else UTF-8)"
    )
    chat_template: str | None = _text(
        None,
        'Jinja file for conversations, or "plain" (default: the template of the tokenizer)',
    )
    regression: bool = _text(False, "learn numbers: one output, mean squared error")
    heldout: str = _text("0.1", "share of the examples to evaluate on, or a file with others")
    max_length: int = _text(
        128, "tokens after which a text is cut, or tokens in a window of SQuAD's texts"
    )
    doc_stride: int = _text(64, "tokens that neighbouring windows of one of SQuAD's texts share")
    method: str = _method(
        "delta-lora", f"what to train, and how: {', '.join(METHODS)}", choices=tuple(METHODS)
    )
    r: int = _method(8, "rank of the low-rank branch")
    alpha: float = _method(16.0, "the low-rank branch is scaled by alpha / r")
    lora_dropout: float = _method(0.0, "dropout before the low-rank branch; not for Delta-LoRA")
    use_rslora: bool = _method(False, "scale the branch by alpha / sqrt(r)")
    target_modules: str = _method(
        "all-linear", 'names separated by commas, "all-linear", or "qv" for query and value'
    )
    update_ratio: float = _method(0.5, "Delta-LoRA's lambda")
    start_step: int = _method(10, "Delta-LoRA's K; W is updated in the steps after it")
    w_update: str = _method(
        "inplace",
        "write the update into W, or keep it beside W in factored form",
        choices=W_UPDATES,
    )
    rounding: str | None = _method(
        None, "rounding of a 16-bit W (default remainder)", choices=ROUNDINGS
    )
    init_r: int | None = _method(None, "AdaLoRA's rank at the start (default 1.5 r)", type=int)
    deltaT: int = _method(10, "steps between AdaLoRA's choices of singular values")
    ratio: float = _diffora(0.5, "rho, the share of the modules of each layer that is selected")
    share_r: int = _diffora(2, "rank of the pairs that the other modules share; 0 freezes them")
    search_rounds: int = _diffora(20, "V, the number of steps on the gates")
    inner_steps: int = _diffora(
        5, "T, the number of steps on the pairs after each step on the gates"
    )
    gate_lr: float = _diffora(0.01, "learning rate of the gates")
    search_share: float = _diffora(
        0.5, "share of the training text for the search, half of it for validation"
    )
    warm_start: bool = _diffora(
        False, "selected pairs keep their values from the search; the paper starts anew"
    )
    lr: float = _training(
        1e-3, "highest learning rate, reached by warm-up and followed by linear decay"
    )
    weight_decay: float = _training(0.01, "decoupled weight decay of everything that is trained")
    warmup_steps: int = _training(10, "steps of linear warm-up")
    warmup_ratio: float | None = _training(None, "warm-up as a share of the steps", type=float)
    label_smoothing: float = _training(0.0, "share of the target spread over all classes or words")
    steps: int = _training(100, "optimizer steps")
    epochs: float | None = _training(
        None, "length of the training in passes over the text", type=float
    )
    batch_size: int = _training(32, "examples that go through the model at a time")
    gradient_accumulation: int = _training(
        1, "batches in each step, whose loss is that of one large batch"
    )
    gradient_checkpointing: bool = _training(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    eval_batch_size: int | None = _training(
        None, "examples at a time in evaluation and generation (default: batch size)", type=int
    )
    evaluate_every: int = _training(
        0, "steps between evaluations on the held-out text; 0: at the end only"
    )
    generate: int = _scores(0, "number of held-out prompts to complete and score; -1: all of them")
    num_beams: int = _scores(1, "number of beams; 1 is greedy search")
    length_penalty: float = _scores(1.0, "exponent of the length that a beam's score is divided by")
    no_repeat_ngram_size: int = _scores(0, "n-grams of this size do not occur twice; 0: they may")
    max_new_tokens: int = _scores(64, "tokens after which a completion is cut")
    dtype: str = _run(
        "float32", "dtype of the frozen weights and the products", choices=tuple(NAMED_DTYPES)
    )
    load_in_4bit: bool = _run(
        False,
        "keep the frozen weights in 4 bits (NF4, by bitsandbytes); not for Delta-LoRA in place",
    )
    adapter_format: str | None = _run(
        None,
        "write the adapter for deltadiff or for PEFT (default: that of the library that trains)",
        choices=ADAPTER_FORMATS,
    )
    device: str = _run("auto", "cpu, cuda or cuda:1; auto takes a GPU if there is one")
    seed: int = _run(0, "seed of the split, the head, the adapters, the batches and dropout")
    save_every: int = _run(50, "steps between checkpoints")

    def check(self) -> None:
        """Check each value, before anything is read.

        Raises:
            ArgumentError: a value is out of its range, or contradicts another one.
        """
        least = {
            "steps": 1, "batch_size": 1, "eval_batch_size": 1, "gradient_accumulation": 1,
            "save_every": 1, "max_length": 2, "doc_stride": 0, "generate": -1, "num_beams": 1,
            "no_repeat_ngram_size": 0, "max_new_tokens": 1, "warmup_steps": 0, "deltaT": 1,
            "search_rounds": 1, "inner_steps": 1, "share_r": 0, "start_step": 0,
            "evaluate_every": 0,
        }  # fmt: skip
        self._check_values()
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < 2**31:
                raise ArgumentError(name, f"{value!r:.60}", f"an int from {lowest} to 2**31 - 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError("lr", self.lr, "a finite number above 0")
        for name in ("weight_decay", "update_ratio"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ArgumentError(name, value, "a finite number of at least 0")
        if self.epochs is not None and not 0 < self.epochs <= 1e6:
            raise ArgumentError("epochs", self.epochs, "a number above 0 and at most 1e6")
        for name in ("warmup_ratio", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ArgumentError(name, value, "a share of at least 0 and below 1")
        if not 0 <= self.seed < 2**31:
            raise ArgumentError("seed", self.seed, "an int from 0 to 2**31 - 1")
        for name, accepted in (("method", tuple(METHODS)), ("dtype", tuple(NAMED_DTYPES))):
            if getattr(self, name) not in accepted:
                raise ArgumentError(name, repr(getattr(self, name)), " or ".join(accepted))
        for name, fixed in METHODS[self.method].fixes.items():
            if getattr(self, name) != fixed:
                accepted = f"{fixed!r}, which method {self.method} stands for"
                raise ArgumentError(name, repr(getattr(self, name)), accepted)
        self._check_adapter()
        self.layout.check()
        if self.regression and not is_column(self.label_column):
            raise ArgumentError("regression", "no label column", "--label-column with numbers")

    def _check_values(self) -> None:
        """Check that numbers are finite, and that files and their names can hold the texts."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ArgumentError(f.name, value, "a finite number")
            if isinstance(value, str):
                try:
                    value.encode()
                except UnicodeEncodeError:
                    raise ArgumentError(f.name, ascii(value), "text that UTF-8 can write") from None
                if "\0" in value:
                    raise ArgumentError(f.name, ascii(value), "text without a NUL")

    def _check_adapter(self) -> None:
        """Check that the method leaves an adapter, and leaves W alone, where that is needed."""
        method = METHODS[self.method]
        formats = method.adapter_formats
        if self.adapter_format is not None and self.adapter_format not in formats:
            accepted = f"{' or '.join(formats) or 'none'} for method {self.method}"
            raise ArgumentError("adapter_format", repr(self.adapter_format), accepted)
        if self.load_in_4bit and not formats:
            given = f"method {self.method}, which trains the weights themselves"
            raise ArgumentError("load_in_4bit", given, "a method that trains adapters")
        if self.load_in_4bit and method.updates_weights and self.w_update == "inplace":
            given = f"method {self.method}, which writes into 4-bit weights"
            raise ArgumentError("load_in_4bit", given, "--w-update factored")

    @property
    def layout(self) -> Layout:
        """How the files are written, for `read_examples`."""
        return Layout(
            self.text_column, self.label_column, self.prompt_column, self.group_column,
            format=self.format, delimiter=self.delimiter, encoding=self.encoding,
        )  # fmt: skip

    @property
    def step_size(self) -> int:
        """How many examples a step of the optimizer has."""
        return self.batch_size * self.gradient_accumulation

    @property
    def measured_at_once(self) -> int:
        """The batch size outside of training."""
        return self.eval_batch_size or self.batch_size

    @property
    def warmup(self) -> int:
        """The number of steps of warm-up."""
        ratio = self.warmup_ratio
        return self.warmup_steps if ratio is None else round(ratio * self.steps)


def make_settings(given: Mapping[str, object]) -> Settings:
    """Settings from what was given, what the method's name stands for, and the preset, if any.

    A value that was given counts first, and one of the preset last.

    Raises:
        ArgumentError: the preset is unknown, or two given values say the same thing.
    """
    for one, other in EXCLUSIVE:
        if one in given and other in given:
            raise ArgumentError(other, f"{given[other]} beside {one} {given[one]}", "one of them")
    values = dict(find_preset(given["preset"]).settings) if "preset" in given else {}
    for pair in EXCLUSIVE:
        if any(name in given for name in pair):
            values = {k: v for k, v in values.items() if k not in pair}
    method = given.get("method", values.get("method", Settings.method))
    if method in METHODS:
        values |= METHODS[method].fixes
    return Settings(**(values | dict(given)))


def read_settings(output: Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
        CheckpointError: there are none, or they are garbled.
    """
    path = output / "settings.json"
    accepted = "the settings of an earlier run"
    with reading(path, accepted):
        settings = Settings(**(json.loads(path.read_bytes()) | {"output": str(output)}))
    for f in fields(Settings):
        value, kind = getattr(settings, f.name), value_type(f)
        numbers = (int, float) if kind is float else kind
        whole = isinstance(value, numbers) and (kind is bool or not isinstance(value, bool))
        whole = whole and (kind is not float or abs(value) < 1e300)
        if not whole and not (value is None and f.default is None):
            raise CheckpointError(str(path), f"{f.name} {value!r:.60}", accepted)
    return settings


def value_type(f: Field) -> type:
    """The type of a field's values that are not None."""
    return f.metadata.get("type", str if f.default in (None, MISSING) else type(f.default))
