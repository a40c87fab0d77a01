"""`deltadiff finetune --resume`: the run ends bit by bit like one that never stopped."""

import itertools
import json
import random

import pytest
from finetune_runs import draw_nothing, finetune, stop_at, trained_bytes, without_times

from deltadiff.diffora import rounds
from deltadiff.finetune import run as run_module
from deltadiff.finetune import training
from deltadiff.finetune.methods.table import METHODS

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:rounding=", "ignore:W of .* layers"),
]

FIXED = ["--label-column", "label", "--device", "cpu", "--lr", "0.01", "--steps", "7"]
FIXED += ["--start-step", "1", "--batch-size", "8", "--r", "4", "--save-every", "3"]
SEARCH = ["--search-rounds", "3", "--inner-steps", "2"]
ROUNDINGS = ["remainder", "stochastic", "nearest"]
HALF = ["bfloat16", "float16"]
HERE = [method for method in METHODS if method not in ("houlsby", "pfeiffer")]
CASES = [f"--method {method}" for method in HERE]
CASES += [
    f"--method {method} --rounding {rounding} --dtype {dtype}"
    for method, rounding, dtype in itertools.product(
        ("delta-lora", "diffora-delta-lora"), ROUNDINGS, HALF
    )
]
CASES += [f"--method {m} --dtype {d}" for m, d in itertools.product(HERE, HALF)]
CASES += [
    f"--method {m} --adapter-format peft" for m in HERE if len(METHODS[m].adapter_formats) > 1
]
CASES += [
    "--method lora --lora-dropout 0.2 --gradient-accumulation 2 --batch-size 4",
    "--method diffora --lora-dropout 0.2 --gradient-accumulation 2 --batch-size 4",
    "--method diffora --warm-start",
    "--method delta-lora --evaluate-every 2 --label-smoothing 0.1",
    "--method full --gradient-checkpointing --evaluate-every 3",
]  # fmt: skip


CASES = list(dict.fromkeys(CASES))


def run(bert, reviews, output, words) -> int:
    return finetune(bert, reviews, "--output", output, *FIXED, *SEARCH, *words.split())


def ended(output) -> tuple[dict, dict]:
    return trained_bytes(output), without_times(json.loads((output / "result.json").read_text()))


def stop(patch, draw, words) -> str:
    """Prepare Ctrl-C at some moment of a run; returns which."""
    moments = ["before the first step", "in the training", "after the last step"]
    searches = words.startswith("--method diffora") and "random" not in words
    moment = draw.choice([*moments[1:2] * 3, *moments, *["in the search"] * 3 * searches])
    if moment == "in the training":
        stop_at(patch, training, draw.randint(1, 7))
    elif moment == "in the search":
        stop_at(patch, rounds, draw.randint(1, 9))  # 3 steps on the gates and 6 on the pairs
    else:
        place = {"before": "train", "after": "measure_weights"}[moment.partition(" ")[0]]

        def interrupt(*args, **more):
            raise KeyboardInterrupt

        patch.setattr(run_module, place, interrupt)
    return moment


@pytest.mark.check(short=4, long=2 * len(CASES))
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    seed, bert, reviews, tmp_path, tally, monkeypatch
):
    draw_nothing(monkeypatch)
    words, draw = CASES[seed * 11 % len(CASES)], random.Random(seed)
    assert run(bert, reviews, tmp_path / "whole", words) == 0
    moments = []
    with pytest.MonkeyPatch.context() as patch:
        moments.append(stop(patch, draw, words))
        assert run(bert, reviews, tmp_path / "out", words) == 130, moments
    if draw.random() < 0.3:  # and stopped again
        with pytest.MonkeyPatch.context() as patch:
            moments.append(stop(patch, draw, words))
            again = finetune("--resume", tmp_path / "out")
    if len(moments) == 1 or again == 130:  # the second moment may have passed already
        assert finetune("--resume", tmp_path / "out") == 0
    same = ended(tmp_path / "out") == ended(tmp_path / "whole")
    tally("resumed runs", "finetune --resume", 1, failures=not same)
    assert same, (words, moments)
    assert finetune("--resume", tmp_path / "out") == 2  # it is finished
    assert not [*(tmp_path / "out").glob("checkpoint-*"), *(tmp_path / "out").glob(".*")]


@pytest.mark.parametrize(("module", "last"), [(rounds, 9), (training, 7)])
def test_ctrl_c_in_the_last_step_stops_what_comes_after_it(
    module, last, bert, reviews, tmp_path, monkeypatch
):
    draw_nothing(monkeypatch)
    words = "--method diffora-delta-lora"
    assert run(bert, reviews, tmp_path / "whole", words) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, module, last)
        assert run(bert, reviews, tmp_path / "out", words) == 130
    assert finetune("--resume", tmp_path / "out") == 0
    assert ended(tmp_path / "out") == ended(tmp_path / "whole")
