"""`deltadiff finetune --resume`: the run ends bit by bit like one that never stopped."""

import itertools
import json

import pytest
from finetune_runs import finetune, stop_at, trained_bytes, without_times

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


def run(bert, reviews, output, words) -> int:
    return finetune(bert, reviews, "--output", output, *FIXED, *SEARCH, *words)


def ended(output) -> tuple[dict, dict]:
    return trained_bytes(output), without_times(json.loads((output / "result.json").read_text()))


@pytest.fixture(scope="module")
def undisturbed(bert, reviews, tmp_path_factory):
    """What a run that was never stopped leaves, by its words; each runs once."""
    found = {}

    def get(words: str):
        if words not in found:
            output = tmp_path_factory.mktemp("whole") / "out"
            assert run(bert, reviews, output, words.split()) == 0
            found[words] = ended(output)
        return found[words]

    return get


def stop_and_go_on(bert, reviews, output, words, module, call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, module, call)
        assert run(bert, reviews, output, words.split()) == 130
    assert finetune("--resume", output) == 0


@pytest.mark.parametrize("words", CASES)
def test_every_method(words, bert, reviews, tmp_path, undisturbed):
    stop_and_go_on(bert, reviews, tmp_path / "out", words, training, 4)
    assert ended(tmp_path / "out") == undisturbed(words)
