"""Where the tests of the operations run, and the rule that they hold results to.

A test that takes ``path`` runs on every backend of every device of this machine; one that takes
``dtype`` too runs in each dtype that the backend does there. Backends are not skipped for being
absent: a C++ extension that was not built fails its tests.
"""

import os
from typing import NamedTuple

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so it comes before

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Path(NamedTuple):
    device: torch.device
    backend: str


def _paths() -> dict[Path, tuple[torch.dtype, ...]]:
    cpu = torch.device("cpu")
    paths = {Path(cpu, "cpp"): (F32, BF16, F16), Path(cpu, "reference"): (F32, BF16)}
    if torch.cuda.is_available():
        paths[Path(torch.device("cuda", torch.cuda.current_device()), "triton")] = (F32, BF16, F16)
    else:
        paths[Path(cpu, "triton")] = (F32, F16)  # Triton's interpreter gets bfloat16 wrong
    return paths


PATHS = _paths()


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


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (which is not zero)."""
    found, truth = found.detach().double(), truth.detach()
    assert found.shape == truth.shape and truth.dtype == torch.float64
    return ((found - truth).norm() / truth.norm()).item()


@pytest.fixture
def gpu_path():
    return next(path for path in PATHS if path.device.type == "cuda")


@pytest.fixture
def assert_close():
    """The measured tolerance: ``factor`` times the error of eager PyTorch, and one rounding."""

    def check(found, eager, truth, factor, dtype=None):
        assert found.shape == truth.shape
        ours, theirs = error(found, truth), error(eager, truth)
        limit = factor * theirs + torch.finfo(dtype or found.dtype).eps / 2
        assert ours <= limit, f"error {ours:.2e}, eager {theirs:.2e}, limit {limit:.2e}"

    return check


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
