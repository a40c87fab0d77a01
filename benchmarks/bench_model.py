"""Training steps of a whole model with random weights."""

from conftest import DEVICE, found

from deltadiff.bench.model import model_records, settings_for


def bench_model(benchmark):
    records = benchmark.pedantic(lambda: list(model_records(DEVICE, settings_for(DEVICE))))
    found.extend(records)
    assert not [r["note"] for r in records if r["note"] not in (None, "out of memory")]
