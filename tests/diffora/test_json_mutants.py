"""Files of gates and selections with any content load or raise a typed error."""

import random

import pytest
from gate_matrices import gate_matrix
from mutants import Mutants, write_json_mutant

from deltadiff.diffora import GateMatrix, Selection

CASES = 50  # for each seed


@pytest.mark.check(short=2, long=20)
@pytest.mark.parametrize("kind", [GateMatrix, Selection])
def test_json_files(kind, seed, tmp_path, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    gates = gate_matrix({"a": 0.1, "b": 0.9}, {"b": 1 / 3, "c": 2 / 3})
    path = tmp_path / "right.json"
    (gates if kind is GateMatrix else gates.discretise(0.5)).save(path)
    right = path.read_bytes()
    for number in range(CASES):
        path = tmp_path / f"{number}.json"
        what = write_json_mutant(path, right, random_)
        if mutants.attempt(f"case {number}: {what}", lambda p=path: kind.load(p)):
            kind.load(path).save(tmp_path / "again.json")
            assert kind.load(tmp_path / "again.json") == kind.load(path)
    mutants.conclude(tally, f"files of {kind.__name__}")
