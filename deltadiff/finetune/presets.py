"""Presets of `deltadiff finetune`: the hyper-parameter tables of the two papers, column by column.

A preset sets what `Settings` has a field for, and lists the rest with the reason. The row "LoRA
drop" of DiffoRA's table 7 is a misprint: it repeats the row above it (alpha, 16), and 16 is no
dropout probability.
"""

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ArgumentError


@dataclass(frozen=True)
class Preset:
    """A column of a table. ``not_set`` says what else the column has, and why it is not set."""

    table: str
    settings: Mapping[str, object]
    not_set: Mapping[str, str] = field(default_factory=dict)


MODEL_DROPOUT = "the model's own dropout layers keep the values of its config.json"
DELTA, DIFFORA = {"method": "delta-lora"}, {"method": "diffora"}

# ----------------------------------------------------------- Delta-LoRA, tables 10 to 14


def _generation(tables: str, training: dict, beams: dict, dropouts: str) -> Preset:
    """A column of tables 10 and 11, or of 12 and 13, which have the values of the beam search."""
    settings = DELTA | {"target_modules": "qv", "label_smoothing": 0.0, "generate": -1}
    return Preset(f"Delta-LoRA, {tables}", settings | training | beams, {dropouts: MODEL_DROPOUT})


_TABLE_10 = {
    "lr": 2e-4, "batch_size": 8, "epochs": 5.0, "weight_decay": 0.01, "start_step": 500, "r": 4,
    "alpha": 32.0, "warmup_steps": 500,
}  # fmt: skip
_TABLE_12 = {
    "lr": 2e-4, "batch_size": 64, "epochs": 25.0, "weight_decay": 0.0, "start_step": 1000,
    "update_ratio": 0.5, "r": 4, "alpha": 32.0, "warmup_steps": 3000,
}  # fmt: skip
GENERATION = {
    "delta-lora/e2e": _generation(
        "tables 10 and 11", _TABLE_10 | {"update_ratio": 2.0},
        {"num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
        "resid_pdrop 0, attn_pdrop 0, embd_pdrop 0",
    ),
    "delta-lora/webnlg": _generation(
        "tables 10 and 11", _TABLE_10 | {"update_ratio": 5.0},
        {"num_beams": 5, "length_penalty": 1.0, "no_repeat_ngram_size": 4},
        "resid_pdrop 0.09, attn_pdrop 0.09, embd_pdrop 0",
    ),
    "delta-lora/xsum": _generation(
        "tables 12 and 13", _TABLE_12,
        {"num_beams": 8, "length_penalty": 1.0, "no_repeat_ngram_size": 4},
        "activation dropout 0, dropout 0, classifier dropout 0",
    ),
}  # fmt: skip


# lr, batch size, epochs, tokens and K; the other rows of table 14 are equal in all columns.
TABLE_14 = {
    "mnli": (5e-4, 128, 30, 256, 2000),
    "sst-2": (5e-4, 128, 60, 256, 400),
    "mrpc": (4e-4, 128, 30, 256, 10),
    "cola": (4e-4, 64, 80, 256, 100),
    "qnli": (4e-4, 128, 25, 256, 800),
    "qqp": (4e-4, 128, 25, 256, 400),
    "rte": (4e-4, 128, 80, 512, 200),
    "sts-b": (4e-4, 128, 40, 256, 200),
}


def _delta_lora_glue(task: str) -> Preset:
    lr, batch_size, epochs, max_length, start_step = TABLE_14[task]
    settings = {
        "lr": lr, "batch_size": batch_size, "epochs": float(epochs), "weight_decay": 0.1,
        "max_length": max_length, "start_step": start_step, "update_ratio": 0.5, "r": 8,
        "alpha": 16.0, "target_modules": "qv", "warmup_ratio": 0.06,
    }  # fmt: skip
    return Preset("Delta-LoRA, table 14", DELTA | settings | _regression(task))


def _regression(task: str) -> dict:
    return {"regression": True} if task == "sts-b" else {}


# ------------------------------------------------------------------ DiffoRA, tables 6, 7

# lr, batch size, epochs, share r, r, LoRA drop and warm-up; K = 3 and alpha = 16 everywhere.
TABLE_6 = {
    "mnli": (3e-4, 196, 7, 2, 4, 0.25, 4000),
    "rte": (7e-4, 32, 50, 2, 4, 0.2, 900),
    "qnli": (6e-4, 64, 5, 1, 6, 0.35, 3000),
    "mrpc": (1e-3, 16, 14, 2, 4, 0.0, 900),
    "qqp": (8e-4, 64, 5, 2, 4, 0.0, 2000),
    "sst-2": (1e-4, 32, 5, 2, 4, 0.0, 3000),
    "cola": (3e-4, 16, 6, 2, 4, 0.15, 900),
    "sts-b": (7e-4, 16, 7, 2, 4, 0.0, 900),
}
K_OF_SIX = {"ratio": 0.5}  # K = 3 of the six linear modules of a layer


def _diffora_glue(task: str) -> Preset:
    lr, batch_size, epochs, share_r, r, dropout, warmup_steps = TABLE_6[task]
    settings = {
        "lr": lr, "batch_size": batch_size, "epochs": float(epochs), "share_r": share_r, "r": r,
        "alpha": 16.0, "lora_dropout": dropout, "warmup_steps": warmup_steps,
    }  # fmt: skip
    early = {"early stop 5": "a run here goes on to its last step"}
    return Preset(
        "DiffoRA, table 6",
        DIFFORA | K_OF_SIX | settings | _regression(task),
        early if task == "cola" else {},
    )


# lr, warm-up, share r, and the ranks of the four sizes, which are named after their share of
# trained parameters in percent.
TABLE_7 = {
    "squad-v1.1": (5e-4, 2000, 1, (1, 2, 5, 10)),
    "squad-v2": (7e-4, 4000, 2, (2, 4, 8, 15)),
}
PERCENT = ("0.08", "0.16", "0.32", "0.65")


def _diffora_squad(version: str, r: int) -> Preset:
    lr, warmup_steps, share_r, _ = TABLE_7[version]
    settings = {
        "format": "squad", "lr": lr, "epochs": 3.0, "share_r": share_r, "r": r, "alpha": 16.0,
        "warmup_steps": warmup_steps,
    }  # fmt: skip
    typo = {"LoRA drop 16": "a dropout of 16 is none: the table repeats its row alpha"}
    return Preset("DiffoRA, table 7", DIFFORA | K_OF_SIX | settings, typo)


# ------------------------------------------------------------------- DiffoRA, table 8

# It gives 1.33 M trained parameters for FLoRA on RoBERTa-base, which is rank 8 on all six linear
# modules of a layer. The scale is the default of FLoRA's authors, 1.
FLORA = Preset(
    "DiffoRA, table 8",
    {"method": "flora", "target_modules": "all-linear", "r": 8, "alpha": 8.0},
    {"learning rate, batch size, epochs, warm-up": "DiffoRA's paper has none for FLoRA"},
)


PRESETS: dict[str, Preset] = {
    **GENERATION,
    **{f"delta-lora/{task}": _delta_lora_glue(task) for task in TABLE_14},
    **{f"diffora/{task}": _diffora_glue(task) for task in TABLE_6},
    **{
        f"diffora/{version}-{percent}": _diffora_squad(version, r)
        for version, (*_, ranks) in TABLE_7.items()
        for percent, r in zip(PERCENT, ranks, strict=True)
    },
    "flora/roberta-base": FLORA,
}


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ArgumentError: there is none; the message lists similar names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=4, cutoff=0.3) or list(PRESETS)
        accepted = f"a name of `deltadiff presets`, such as {', '.join(near[:4])}"
        raise ArgumentError("preset", repr(name), accepted)
    return PRESETS[name]


def describe(name: str) -> str:
    """What a preset sets, and what it leaves, as text."""
    preset = find_preset(name)
    width = max(map(len, preset.settings))
    lines = [f"{name} ({preset.table})"]
    lines += [f"  --{k.replace('_', '-'):<{width}}  {v}" for k, v in preset.settings.items()]
    lines += [f"  not set here: {what}: {why}" for what, why in preset.not_set.items()]
    return "\n".join(lines)


def overview() -> str:
    """The names of all presets with their tables."""
    width = max(map(len, PRESETS))
    return "\n".join(f"{name:<{width}}  {preset.table}" for name, preset in PRESETS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument of `deltadiff presets`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="such as delta-lora/e2e")


def run(args: argparse.Namespace) -> int:
    """Print all presets, or what one of them sets."""
    print(describe(args.name) if args.name else overview())
    return 0
