"""What PEFT's calls do to swapped and trained models, and how many of PEFT's cases are equal.

python benchmarks/peft_calls.py    writes results/peft-calls.json, and prints the numbers

`outcome` in tests/support/peft_calls.py says what is measured; the cases are those of the tests in
tests/layers/peft.
"""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

from deltadiff.devices import package_versions
from deltadiff.errors import SwapError
from deltadiff.files import write_records
from deltadiff.text import align_columns

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models

from peft_calls import CALLS, outcome
from peft_cases import CASES, Case
from peft_checks import assert_equal_runs, fused_calls, layers_named, run, swap_quietly
from peft_models import input_of, output_of
from peft_tuners import ON_OTHER_LAYERS, TUNERS, Tuner, build_tuner
from trained_peft import METHODS

RESULT = Path(__file__).parent / "results" / "peft-calls.json"
VERSIONS = ("torch", "transformers", "peft")


def main() -> None:
    transformers.logging.set_verbosity_error()  # its reports of what an adapter's file lacks
    versions = {name: package_versions()[name] for name in VERSIONS}
    records = list(measure())
    write_records(RESULT, [{**record, **versions} for record in records])
    print(align_columns([(r["call"], *r["outcomes"].values()) for r in records]))
    print(count_cases())
    print(f"written: {RESULT}")


def measure() -> Iterator[dict]:
    """A record for each call, without the versions that it depends on."""
    for call in CALLS:
        outcomes = {method: outcome(call, method) for method in METHODS}
        yield {"op": "peft_call", "call": call.name, "outcomes": outcomes}


def count_cases() -> str:
    """How many cases of PEFT run, are equal, and go through PEFT's own forward pass, in words."""
    warnings.simplefilter("ignore")  # PEFT's own, about these configurations
    results = [_lora(case) for case in CASES]
    equal, fused, own = (sum(column) for column in zip(*results, strict=True))
    partly = sum(1 for _, _, layers in results if layers)
    others = [_other(*pair) for pair in (*TUNERS.items(), *ON_OTHER_LAYERS)]
    return (
        f"{len(results)} cases of LoRA run, {equal} are equal: {fused} layers are fused, and {own} "
        f"in {partly} cases run PEFT's own forward pass\n"
        f"{len(others)} cases of {len(TUNERS)} other tuners run, {sum(others)} are refused by "
        "`swap_` and equal"
    )


def _lora(case: Case) -> tuple[bool, int, int]:
    """Whether the swapped model is equal, its fused layers, and the others."""
    (plain, swapped), x = (case.build() for _ in range(2)), input_of(case.model)
    report = swap_quietly(swapped)
    with fused_calls(swapped) as calls:
        found = run(swapped, x, output_of)
    try:
        assert_equal_runs(run(plain, x, output_of), found)
    except AssertionError:
        return False, 0, 0
    return True, len(calls), len(layers_named(swapped, report)) - len(calls)


def _other(kind: str, tuner: Tuner) -> bool:
    """Whether `swap_` refuses the model, whose outputs stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        model, x = build_tuner(kind, tuner, Path(folder)), input_of(tuner.model, torch.float32)
    before, _ = run(model, x, output_of, **tuner.arguments)
    try:
        swap_quietly(model)
    except SwapError:
        return torch.equal(run(model, x, output_of, **tuner.arguments)[0], before)
    return False


if __name__ == "__main__":
    main()
