"""Tables of launch configurations with any content are read, or one error names the row."""

import json
import random

import pytest
from launch_tables import HOPPER, NAME
from mutants import Mutants, write_json_mutant

from deltadiff.kernels.runtime.tuned import Launch
from deltadiff.tuning.table import read, write

CASES = 100  # for each seed
OTHER = Launch("delta_update", (16, 2, "nearest"))


@pytest.mark.check(short=1, long=20)
@pytest.mark.filterwarnings("ignore")
def test_tables(seed, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    write(tmp_path / "right.json", NAME, {OTHER: {"num_warps": 8}, HOPPER: {"GROUP_SIZE_M": 4}})
    right = (tmp_path / "right.json").read_bytes()
    assert json.loads(right)
    for number in range(CASES):
        path = tmp_path / f"{number}.json"
        what = write_json_mutant(path, right, random_)
        mutants.attempt(f"case {number}: {what}", lambda p=path: read(p))
    mutants.conclude(tally, "tuned tables")
