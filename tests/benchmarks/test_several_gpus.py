"""benchmarks/several_gpus.py: the committed table of several GPUs is what runs give now."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from ranks import short_form
from several_gpus import METHODS, ROWS, WAYS, ZERO, compare, in_one, outcomes

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "several-gpus-cpu.json"
SHORT = {
    "FSDP2": ["Delta-LoRA in place, remainder", "`save_adapter`, factored"],
    "tensor parallelism": ["LoRA"],
}


@pytest.fixture(scope="module")
def committed():
    return {r["method"]: r["outcomes"] for r in json.loads(RESULT.read_text())}


def test_every_cell_is_in_the_table(committed):
    assert list(committed) == ROWS
    assert all(list(cells) == list(WAYS) for cells in committed.values())
    words = {text for cells in committed.values() for text in cells.values() if text}
    assert all(re.fullmatch(r"bit-equal|equal to \de-\d\d|refused: .+", text) for text in words)


@pytest.mark.parametrize("way", short_form(WAYS, *SHORT))
def test_a_way_gives_what_the_table_says(way, committed, pytestconfig):
    if way in ZERO and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed")
    rows = None if pytestconfig.option.check else SHORT[way]
    words = "run benchmarks/several_gpus.py and benchmarks/tables.py"
    for row, text in outcomes(way, rows).items():
        told = committed[row][way]
        fine = text == told or (told.startswith("equal to") and not text.startswith("refused"))
        assert fine, f"{row} under {way}: {text}; {words}"


def test_methods_differ_from_each_other():
    """Cells would be equal as well if nothing was trained, or if W was not updated."""
    names = [m.name for m in METHODS if "LoRA" in m.name and "`" not in m.name]
    found = [in_one("alone", name, "cpu") for name in names]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_a_difference_is_rounding_or_an_error():
    assert compare([[1.0, 2.0]], [[1.0, 2.0]]) == "bit-equal"
    assert compare([[1.0, 2.0]], [[1.0, 2.0 + 3e-7]]) == "equal to 3e-07"
    for wrong in (2.1, float("nan")):
        with pytest.raises(AssertionError, match="differs by"):
            compare([[1.0, 2.0]], [[1.0, wrong]])
