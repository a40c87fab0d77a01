"""Every value of the presets against the papers' tables, typed here from their text."""

import json

import pytest

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError
from deltadiff.finetune.presets import PRESETS, describe, find_preset
from deltadiff.finetune.settings import Settings, make_settings

# Delta-LoRA, tables 10 and 11 (the columns E2E Challenge, WebNLG Challenge 2017), 12 and 13.
GENERATION = """
Learning Rate          2e-4  2e-4  2e-4
Batch Size             8     8     64
Number of Epochs       5     5     25
Weight Decay           0.01  0.01  0
Label Smooth           0     0     -
Start Steps K          500   500   1000
Update Ratio           2     5     0.5
Rank r                 4     4     4
Alpha                  32    32    32
Warmup Steps           500   500   3000
Beam Size              10    5     8
Penalty                0.8   1.0   1.0
No Repeat Ngram Size   4     4     4
"""
NAMES = {
    "Learning Rate": "lr", "Batch Size": "batch_size", "Number of Epochs": "epochs",
    "Weight Decay": "weight_decay", "Label Smooth": "label_smoothing",
    "Start Steps K": "start_step", "Update Ratio": "update_ratio", "Rank r": "r", "Alpha": "alpha",
    "Warmup Steps": "warmup_steps", "Beam Size": "num_beams", "Penalty": "length_penalty",
    "No Repeat Ngram Size": "no_repeat_ngram_size", "Max Sequence Length": "max_length",
    "Warmup Ratio": "warmup_ratio",
}  # fmt: skip

# Delta-LoRA, table 14.
GLUE = """
Learning Rate        5e-4  5e-4  4e-4  4e-4  4e-4  4e-4  4e-4  4e-4
Batch Size           128   128   128   64    128   128   128   128
Number of Epochs     30    60    30    80    25    25    80    40
Weight Decay         0.1   0.1   0.1   0.1   0.1   0.1   0.1   0.1
Max Sequence Length  256   256   256   256   256   256   512   256
Start Steps K        2000  400   10    100   800   400   200   200
Update Ratio         0.5   0.5   0.5   0.5   0.5   0.5   0.5   0.5
Rank r               8     8     8     8     8     8     8     8
Alpha                16    16    16    16    16    16    16    16
Warmup Ratio         0.06  0.06  0.06  0.06  0.06  0.06  0.06  0.06
"""
GLUE_TASKS = ["mnli", "sst-2", "mrpc", "cola", "qnli", "qqp", "rte", "sts-b"]

# DiffoRA, table 6: learning rate, batch size, epochs, share r, r, K, alpha, LoRA drop, warm-up.
DIFFORA_GLUE = """
MNLI   3e-4 196 7  2 4 3 16 0.25 4000
RTE    7e-4 32  50 2 4 3 16 0.2  900
QNLI   6e-4 64  5  1 6 3 16 0.35 3000
MRPC   1e-3 16  14 2 4 3 16 0    900
QQP    8e-4 64  5  2 4 3 16 0    2000
SST-2  1e-4 32  5  2 4 3 16 0    3000
CoLA   3e-4 16  6  2 4 3 16 0.15 900
STS-B  7e-4 16  7  2 4 3 16 0    900
"""

# DiffoRA, table 7: #Params, r, train epochs, learning rate, warm-up, share r, K, alpha.
SQUAD = """
squad-v1.1 0.08 1  3 5e-4 2000 1 3 16
squad-v1.1 0.16 2  3 5e-4 2000 1 3 16
squad-v1.1 0.32 5  3 5e-4 2000 1 3 16
squad-v1.1 0.65 10 3 5e-4 2000 1 3 16
squad-v2   0.08 2  3 7e-4 4000 2 3 16
squad-v2   0.16 4  3 7e-4 4000 2 3 16
squad-v2   0.32 8  3 7e-4 4000 2 3 16
squad-v2   0.65 15 3 7e-4 4000 2 3 16
"""


def columns(text: str, count: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = [{} for _ in range(count)]
    for line in text.strip().splitlines():
        *name, values = line.rsplit(maxsplit=count)[0], line.rsplit(maxsplit=count)[1:]
        for column, value in zip(found, values, strict=True):
            if value != "-":
                column[NAMES[name[0].strip()]] = float(value)
    return found


def check(name: str, expected: dict, **more) -> None:
    """The preset sets what the table has, and nothing else."""
    found = dict(PRESETS[name].settings)
    assert {k: found.pop(k) for k in expected} == expected
    assert found == more
    settings = make_settings({"model": "m", "data": "d", "label_column": "x", "preset": name})
    kinds = {f: type(v) for f, v in vars(settings).items() if f in PRESETS[name].settings}
    assert kinds == {f: type(v) for f, v in PRESETS[name].settings.items()}
    settings.check()


def test_generation():
    more = {"method": "delta-lora", "target_modules": "qv", "generate": -1}
    tasks = ["delta-lora/e2e", "delta-lora/webnlg", "delta-lora/xsum"]
    for name, expected in zip(tasks, columns(GENERATION, 3), strict=True):
        check(name, {"label_smoothing": 0.0} | expected, **more)


def test_delta_lora_glue():
    for task, expected in zip(GLUE_TASKS, columns(GLUE, 8), strict=True):
        more = {"regression": True} if task == "sts-b" else {}
        check(f"delta-lora/{task}", expected, method="delta-lora", target_modules="qv", **more)


def test_diffora_glue():
    names = ["lr", "batch_size", "epochs", "share_r", "r", "K", "alpha", "lora_dropout"]
    for line in DIFFORA_GLUE.strip().splitlines():
        task, *values = line.split()
        expected = dict(zip([*names, "warmup_steps"], map(float, values), strict=True))
        expected["ratio"] = expected.pop("K") / 6
        more = {"regression": True} if task == "STS-B" else {}
        check(f"diffora/{task.lower()}", expected, method="diffora", **more)
    assert "early stop 5" in PRESETS["diffora/cola"].not_set


def test_diffora_squad():
    names = ["r", "epochs", "lr", "warmup_steps", "share_r", "K", "alpha"]
    for line in SQUAD.strip().splitlines():
        version, percent, *values = line.split()
        expected = dict(zip(names, map(float, values), strict=True))
        expected["ratio"] = expected.pop("K") / 6
        name = f"diffora/{version}-{percent}"
        check(name, expected, method="diffora", format="squad")
        assert "LoRA drop 16" in PRESETS[name].not_set  # no dropout can be that


def test_flora():
    """DiffoRA's table 8: 1.33M trained parameters beside RoBERTa-base's head."""
    check("flora/roberta-base", {"r": 8, "alpha": 8}, method="flora", target_modules="all-linear")
    d, f, layers, r = 768, 3072, 12, PRESETS["flora/roberta-base"].settings["r"]
    pairs, cores = (4 * (d + d) + 2 * (d + f)) * r, 6 * r * r
    assert round(layers * (pairs + cores) / 1e6, 2) == 1.33
    assert "learning rate" in describe("flora/roberta-base")


def test_there_is_a_preset_for_each_column_and_no_other():
    named = {"delta-lora/e2e", "delta-lora/webnlg", "delta-lora/xsum"}
    named |= {f"{paper}/{task}" for paper in ("delta-lora", "diffora") for task in GLUE_TASKS}
    named |= {
        f"diffora/{version}-{percent}"
        for version, percent, *_ in map(str.split, SQUAD.strip().splitlines())
    }
    assert set(PRESETS) == named | {"flora/roberta-base"}


def test_what_is_given_comes_before_the_preset():
    given = {"model": "m", "data": "d", "preset": "delta-lora/e2e", "r": 2, "steps": 7}
    settings = make_settings(given)
    assert (settings.r, settings.alpha, settings.num_beams) == (2, 32.0, 10)
    assert settings.steps == 7 and settings.epochs is None
    settings = make_settings(given | {"preset": "delta-lora/rte", "warmup_steps": 3})
    assert settings.warmup == 3 and settings.warmup_ratio is None


def test_one_preset_of_a_method_can_train_another():
    given = {"model": "m", "data": "d", "preset": "delta-lora/e2e", "method": "lora"}
    assert make_settings(given).method == "lora"


def test_values_that_say_the_same_twice():
    with pytest.raises(ArgumentError, match="epochs: got 2"):
        make_settings({"model": "m", "data": "d", "steps": 3, "epochs": 2.0})


def test_an_unknown_preset_names_near_ones():
    with pytest.raises(ArgumentError, match="delta-lora/e2e"):
        find_preset("delta-lora/e2")


def test_all_presets_make_settings():
    for name in PRESETS:
        assert isinstance(make_settings({"model": "m", "data": "d", "preset": name}), Settings)
        json.dumps(dict(PRESETS[name].settings))


def test_the_command(capsys):
    assert main(["presets"]) == 0
    assert set(PRESETS) == {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert main(["presets", "delta-lora/webnlg"]) == 0
    text = capsys.readouterr().out
    assert text.rstrip() == describe("delta-lora/webnlg")
    assert "tables 10 and 11" in text and "--update-ratio" in text and "attn_pdrop 0.09" in text
    assert main(["presets", "delta-lora"]) == 2
    assert "deltadiff presets" in capsys.readouterr().err


def test_show(capsys):
    pytest.importorskip("transformers")
    assert main(["finetune", "--preset", "diffora/cola", "--show"]) == 0
    assert capsys.readouterr().out.rstrip() == describe("diffora/cola")
