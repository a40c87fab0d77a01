"""Fixtures of the benchmarks, and the table at the end. Run with `pytest benchmarks/`."""

from pathlib import Path

import pytest
import torch

from deltadiff.bench import timing as measure
from deltadiff.devices import environment, free_memory

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
RESULTS = Path(__file__).parent / "results"
found: list[dict] = []


@pytest.fixture
def compare(benchmark):
    """compare(case, wanted) measures a case and keeps a record a variant."""

    def repeat(one_round, rounds):
        benchmark.pedantic(one_round, rounds=rounds)

    def run(case, wanted=None):
        records = measure.compare(case, DEVICE, wanted, repeat=repeat)
        found.extend(records)
        assert not [r["note"] for r in records if r["note"] not in (None, "out of memory")]

    yield run
    free_memory(DEVICE)


def pytest_terminal_summary(terminalreporter):
    if not found:
        return
    where = environment(DEVICE)
    terminalreporter.section(f"{where['gpu']}, torch {where['torch']}, threads {where['threads']}")
    terminalreporter.write_line(measure.format_table(found))
    for path in measure.write(found, RESULTS, DEVICE):
        terminalreporter.write_line(f"written: {path}")
