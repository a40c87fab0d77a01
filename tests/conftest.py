"""What all tests share: where they run, their short and their long form, and common fixtures.

A test that takes ``path`` runs on every backend of every device of this machine; one that takes
``dtype`` too runs in each dtype that the backend does there. Backends are not skipped for being
absent: a C++ extension that was not built fails its tests.

A test with ``@pytest.mark.check(short=2, long=100)`` takes ``seed`` and runs for so many seeds:
the short form begins with seed 0. The long form (``make check``, that is ``pytest --check -m
check``) begins with a new seed, which the head of the report and the name of a failed test show;
``--seed`` gives it again. With ``--record``, a run without a failure writes what its tests counted
with the fixture ``tally`` to benchmarks/results. A test or a case marked ``long`` is of the long
form alone.
"""

import os
import secrets

import pytest
import tally as tallies
import torch
from op_paths import F32, op_paths
from tolerance import assert_close_to_truth

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it comes before

PATHS = op_paths()


# ---------------------------------------------------------------- short and long form


def pytest_addoption(parser):
    text = "the long form of the tests that have one (marked check)"
    parser.addoption("--check", action="store_true", help=text)
    text = "the first seed of the tests that are marked check (default: 0; with --check, a new one)"
    parser.addoption("--seed", type=int, help=text)
    text = "write what was counted to benchmarks/results, if no test failed"
    parser.addoption("--record", action="store_true", help=text)


def pytest_configure(config):
    if config.option.seed is None:
        config.option.seed = secrets.randbits(31) if config.option.check else 0


def pytest_report_header(config):
    return f"form: {'long' if config.option.check else 'short'}, --seed {config.option.seed}"


# ---------------------------------------------------------------- what was counted

counted: list[dict] = []


@pytest.fixture
def tally(record_property):
    """tally(suite, op, cases, ...) counts cases for the table of checks, see `tally.row`."""
    return lambda *args, **fields: record_property(tallies.PROPERTY, tallies.row(*args, **fields))


def pytest_runtest_logreport(report):
    if report.when == "call":
        counted.extend(row for name, row in report.user_properties if name == tallies.PROPERTY)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    rows = tallies.merge(counted)
    if not rows or not config.option.check:
        return
    terminalreporter.section("counted")
    for row in rows:
        terminalreporter.write_line(tallies.describe(row))
    if config.option.record and exitstatus == 0:
        for path in tallies.write(rows, config.option.seed):
            terminalreporter.write_line(f"written: {path}")


# ---------------------------------------------------------------- parameters


def pytest_generate_tests(metafunc):
    def param(path, *values):
        marks = [pytest.mark.gpu] if path.device.type == "cuda" else []
        names = [f"{path.backend}-{path.device.type}", *(str(v)[6:] for v in values)]
        return pytest.param(path, *values, marks=marks, id="-".join(names))

    if {"path", "dtype"} <= set(metafunc.fixturenames):
        pairs = [param(path, dtype) for path, dtypes in PATHS.items() for dtype in dtypes]
        metafunc.parametrize(("path", "dtype"), pairs)
    elif "path" in metafunc.fixturenames:
        metafunc.parametrize("path", [param(path) for path in PATHS])

    form = metafunc.definition.get_closest_marker("check")
    if form is not None:
        options = metafunc.config.option
        count = form.kwargs["long" if options.check else "short"]
        metafunc.parametrize("seed", range(options.seed, options.seed + count))


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("long") and not config.option.check:
            item.add_marker(pytest.mark.skip(reason="of the long form"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


# ---------------------------------------------------------------- fixtures


@pytest.fixture
def gpu_path():
    return next(path for path in PATHS if path.device.type == "cuda")


@pytest.fixture
def assert_close():
    """`tolerance.assert_close_to_truth`."""
    return assert_close_to_truth


@pytest.fixture
def on_capability(monkeypatch):
    """Pretend that cuda:0 is a GPU of this compute capability."""
    from deltadiff.ops.dispatch import choose_path

    def pretend(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        choose_path.cache_clear()
        return torch.device("cuda:0")

    yield pretend
    choose_path.cache_clear()


@pytest.fixture
def randn():
    """Normal numbers that are the same on every device and in every run."""
    generator = torch.Generator().manual_seed(20)

    def make(*shape, dtype=F32, device="cpu", scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    return make


@pytest.fixture
def randint():
    """Small integers, as floats: their products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(21)

    def make(*shape, dtype=F32, device="cpu"):
        return torch.randint(-4, 5, shape, generator=generator).to(device=device, dtype=dtype)

    return make
