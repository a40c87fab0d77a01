"""`deltadiff verify --full`: random calls of every operation pass on every path that is here."""

import pytest
import torch

from deltadiff.verify.grid.paths import PATHS, backend_of
from deltadiff.verify.grid.run import CASES, GRID, run_grid
from deltadiff.verify.grid.table import format_cells

# Triton's interpreter computes with NumPy, which warns of what GPUs do quietly.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
BACKENDS = [
    *(("cpu", backend) for backend in ("reference", "cpp", "triton")),
    *(pytest.param("cuda:0", b, marks=pytest.mark.gpu) for b in ("reference", "triton", "hopper")),
]


@pytest.mark.parametrize("device, backend", BACKENDS)
@pytest.mark.parametrize("op", GRID)
@pytest.mark.check(short=1, long=1)
def test_random_calls(op, device, backend, seed, tally, request):
    if not any(backend_of(path) == backend for path in PATHS[op]):
        pytest.skip(f"{op} has no kernel of that backend")
    long, device = request.config.option.check, torch.device(device)
    interpreted = backend == "triton" and device.type == "cpu"  # a second for a case
    large = op in ("gated_mlp", "decode_4bit", "decode_fp8")
    slow = backend == "reference" or (interpreted and op == "gated_mlp")
    if large and slow and not long:
        pytest.skip("in the long form: the reference, and the layers of a block interpreted")
    few = 3 if interpreted or large else 10
    found = run_grid(
        device, seed, [op], backend, CASES if long else few, workers=None if long else 1
    )
    for cell in found:
        if cell.cases:
            path = f"{cell.path}-{device.type}"
            tally("verify", op, cell.cases, cell.failures, path, cell.dtype, cell.worst_ratio)
    assert not any(cell.failures for cell in found), format_cells(found, device, seed)
    if not any(cell.cases for cell in found):
        pytest.skip("; ".join({cell.note for cell in found}))
