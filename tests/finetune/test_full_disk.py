"""Whatever does not fit on the disk, one line says which file, and no part of a file stays."""

import random

import pytest
from full_disk import run_with_limit
from mutants import Mutants

from deltadiff.__main__ import main

pytest_plugins = ["tiny_models"]
METHODS = ("delta-lora", "full", "lora", "diffora")
CASES = 4  # for each seed


@pytest.fixture(scope="module")
def trained(bert, tmp_path_factory):
    """Words for a run and for merging what it trained."""
    data = tmp_path_factory.mktemp("data") / "small.csv"
    data.write_text("text,label\n" + "great film,fun\ndull film,dull\n" * 8)
    words = ["finetune", bert, str(data), "--label-column", "label", "--device", "cpu"]
    words += ["--steps", "3", "--save-every", "1", "--batch-size", "2", "--search-rounds", "2"]
    output = tmp_path_factory.mktemp("run")
    assert main([*words, "--output", str(output)]) == 0
    return words, ["merge", bert, str(output / "adapter")]


@pytest.mark.check(short=1, long=20)
def test_full_disks(seed, trained, tmp_path, tally, one_thread):
    random_ = random.Random(seed)
    mutants = Mutants()
    finetune, merge = trained
    for number in range(CASES):
        output, limit = (
            tmp_path / str(number),
            int(2 ** random_.uniform(11, 18)),
        )  # the log has to fit
        words = [*merge, str(output)]
        if random_.random() < 0.7:
            words = [*finetune, "--method", random_.choice(METHODS), "--output", str(output)]
        code, lines = run_with_limit(words, limit, tmp_path / "log")
        case = f"{words[0]} {words[-3]} with {limit} bytes: code {code}, {lines[-3:]}"
        mutants.cases += 1
        told = [line for line in lines if line.startswith("deltadiff")]
        mutants.check(case, code in (0, 1, 2) and "Traceback" not in str(lines), "no exit code")
        mutants.check(case, code == 0 or len(told) == 1, "not one line")
        left = [path for path in tmp_path.rglob(".*") if path.name != ".deltadiff.lock"]
        mutants.check(case, not left, f"leftovers: {left}")
    mutants.conclude(tally, "full disks")
