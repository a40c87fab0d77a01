"""Training steps of a whole model with random weights, beside PEFT and a frozen model."""

from conftest import DEVICE

from deltadiff.bench.model import model_records, settings_for


def bench_model(benchmark, keep):
    keep(benchmark.pedantic(lambda: list(model_records(DEVICE, settings_for(DEVICE)))))
