"""Fixtures of the benchmarks, and the table at the end. Run with `pytest benchmarks/`."""

from pathlib import Path

import pytest

from deltadiff.bench import timing
from deltadiff.bench.records import failed, write
from deltadiff.bench.report import format_table
from deltadiff.devices import default_device, environment, find_device, free_memory

RESULTS = Path(__file__).parent / "results"
DEVICE = find_device(default_device())
measured: list[dict] = []


@pytest.fixture
def keep():
    """keep(records) puts them into the table and the files, and fails where a variant did."""

    def run(records):
        measured.extend(records)
        assert not [r["note"] for r in records if failed(r)]

    yield run
    free_memory(DEVICE)


@pytest.fixture
def compare(benchmark, keep):
    """compare(case, wanted) measures the wanted variants of a case and keeps the records."""

    def repeat(one_round, rounds):
        benchmark.pedantic(one_round, rounds=rounds)

    return lambda case, wanted=None: keep(timing.compare(case, DEVICE, wanted, repeat=repeat))


def pytest_terminal_summary(terminalreporter):
    if not measured:
        return
    where = environment(DEVICE)
    terminalreporter.section(f"{where['gpu']}, torch {where['torch']}, threads {where['threads']}")
    terminalreporter.write_line(format_table(measured))
    for path in write(measured, RESULTS, DEVICE):
        terminalreporter.write_line(f"written: {path}")
