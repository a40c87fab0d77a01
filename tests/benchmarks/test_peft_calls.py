"""benchmarks/peft_calls.py: the committed table of PEFT's calls is what the calls do now."""

import importlib.util
import json
from pathlib import Path

import pytest
from peft_calls import CALLS, outcome
from trained_peft import METHODS

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "peft-calls.json"
WORDS = {"right", "raises", "warns"}


@pytest.fixture(scope="module")
def committed():
    return {r["call"]: r["outcomes"] for r in json.loads(RESULT.read_text())}


def test_every_call_is_in_the_table(committed):
    assert list(committed) == [call.name for call in CALLS]
    assert all(list(outcomes) == list(METHODS) for outcomes in committed.values())
    assert {word for outcomes in committed.values() for word in outcomes.values()} == WORDS
    assert all(outcomes["LoRA"] == "right" for outcomes in committed.values())


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_a_call_does_what_the_table_says(call, committed):
    found = {method: outcome(call, method) for method in METHODS}
    words = "run benchmarks/peft_calls.py and benchmarks/tables.py"
    assert found == committed[call.name], words


def test_the_script_counts_pefts_cases():
    path = ROOT / "benchmarks" / "peft_calls.py"
    spec = importlib.util.spec_from_file_location("peft_calls_script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lora, others = (line.split() for line in script.count_cases().splitlines())
    assert int(lora[0]) == int(lora[5]) > 50 and int(lora[8]) > int(lora[13]) > 0
    assert int(others[0]) == int(others[7]) > 60
