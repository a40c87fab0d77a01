"""`deltadiff verify`: what is right passes; what runs and what is skipped; the arguments."""

import pytest
import torch

from deltadiff.checks import NO_ROUNDING, ROUNDINGS
from deltadiff.devices import find_device
from deltadiff.errors import ArgumentError, BackendUnavailableError
from deltadiff.ops.dispatch import choose_path
from deltadiff.verify.run import OPERATIONS, run
from deltadiff.verify.tolerance import Bench, format_table

SEED = 7
ALL_ROUNDINGS = (NO_ROUNDING, *ROUNDINGS)


@pytest.fixture
def no_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    choose_path.cache_clear()


# ---------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op != "lora_linear_fp8"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_passes(op, backend):
    rows, ok = run("cpu", [op], backend, quick=True, seed=SEED)
    assert ok, format_table([row for row in rows if not row.ok])
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16", "float64"}
    assert {row.path for row in rows if row.dtype == "float64"} == {"reference"}
    if backend:
        assert {row.path for row in rows} == {backend}


def test_products_in_fp8_are_skipped_in_words():
    for backend, why in (None, "the sm_90 kernels are for NVIDIA GPUs"), ("cpp", "'cpp' was asked"):
        rows, ok = run("cpu", ["lora_linear_fp8"], backend, quick=True, seed=SEED)
        assert rows and all(why in row.note for row in rows) and not ok


def test_covers_every_output():
    rows, _ = run("cpu", quick=True, seed=SEED)
    close = {(row.op, row.output) for row in rows if row.worst is not None}
    assert close == {
        *(("lora_linear", output) for output in ("y", "dx", "dA", "dB", "dgate", "dbias")),
        *(("decode_4bit", output) for output in ("y", "dx", "dA", "dB")),
        *(("decode_fp8", output) for output in ("y", "dx", "dA", "dB")),
        *(("gated_mlp", output) for output in ("y", "dx", "dA", "dB", "dgate", "dbias")),
        *(("delta_update", f"{rounding}: W") for rounding in ALL_ROUNDINGS),
        *(("adamw_step", output) for output in ("p'", "m", "v")),
    }
    # The yardstick is sound: eager PyTorch is a few roundings off, and no input is so small or so
    # ill-conditioned that its limit lets anything through.
    for row in rows:
        if row.worst is not None:
            assert row.eager < 16 * torch.finfo(getattr(torch, row.dtype)).eps, row


def test_full_run_has_mixed_dtypes_and_more_shapes():
    rows, ok = run("cpu", ["adamw_step"], seed=SEED)
    assert ok
    assert {"bfloat16/float32", "float16/float32"} < {row.dtype for row in rows}
    assert {row.shape.partition(",")[0] for row in rows} == {"6 tensors"}


def test_seed():
    def errors(ops, seed):
        rows, _ = run("cpu", ops, quick=True, seed=seed)
        return [row.error for row in rows if row.op == "adamw_step"]

    assert errors(["adamw_step"], 1) == errors(["delta_update", "adamw_step"], 1)
    assert errors(["adamw_step"], 1) != errors(["adamw_step"], 2)
    new = [run("cpu", ["adamw_step"], quick=True)[0][0].seed for _ in range(2)]
    assert new[0] != new[1]


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATIONS)
def test_passes_on_every_gpu(op):
    for i in range(torch.cuda.device_count()):
        rows, ok = run(f"cuda:{i}", [op], quick=True)
        assert ok, format_table([row for row in rows if not row.ok])


@pytest.mark.gpu
def test_paths_on_a_gpu():
    """A row tells which kernels ran; what a backend does not take is skipped with the reason."""
    rows, _ = run("cuda", ["lora_linear"], quick=True, seed=SEED)
    paths = {(row.shape, row.dtype): row.path for row in rows}
    half = torch.cuda.get_device_capability() == (9, 0)
    assert paths["640x520x776 r=16", "bfloat16"] == ("hopper" if half else "triton")
    assert paths["640x520x776 r=16", "float32"] == "triton"
    assert paths["64x96x80 r=8", "bfloat16"] == "triton"  # few tokens


# ------------------------------------------------------------- backends and arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")
def test_interpreter():
    rows, ok = run("cpu", ["adamw_step"], "triton", quick=True, seed=SEED)
    assert ok, format_table(rows)
    assert {row.dtype for row in rows if row.ok is None} == {"bfloat16"}
    assert {row.dtype for row in rows if row.path == "triton" and row.ok} == {"float32", "float16"}


def test_what_a_backend_does_not_take_is_skipped(monkeypatch):
    def some(device, dtype, asked, layer, dropout=False, fp8_block=None):
        if asked == "triton" and layer == (65, 129, 3):
            raise BackendUnavailableError("backend", "'triton': odd", "another")
        return choose_path(device, dtype, None, layer, dropout)

    monkeypatch.setattr("deltadiff.verify.tolerance.choose_path", some)
    monkeypatch.setattr("deltadiff.verify.run.choose_path", some)
    rows, ok = run("cpu", ["lora_linear"], "triton", quick=True, seed=SEED)
    skipped = [row for row in rows if row.ok is None]
    assert ok and len(skipped) == 3 < len(rows)  # not float64, which is the reference's
    assert {(row.shape, row.note) for row in skipped} == {
        ("37x129x65 r=3", "skipped: 'triton': odd")
    }


def test_the_path_of_a_call(monkeypatch):
    """Rows name the backend whose kernel runs the call; the operation is asked for the layer's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    choose_path.cache_clear()
    layer, half = (64, 64, 8), [torch.bfloat16] * 2

    def case(backend, *args):
        bench = Bench(torch.device("cuda:0"), backend, True, SEED)
        return bench.case("lora_linear", half, "", layer, *args)

    try:
        for backend in (None, "hopper"):
            paths = {m: case(backend, False, m) for m in (255, 256)}
            assert {m: found.path for m, found in paths.items()} == {255: "triton", 256: "hopper"}
            assert {found.backend for found in paths.values()} == {"hopper"}
        dropped = case(None, True, 256)
        assert (dropped.path, dropped.backend, dropped.why_not) == ("triton", "triton", "")
        assert "the sm_90 kernel has no dropout" in case("hopper", True, 256).why_not
    finally:
        choose_path.cache_clear()


def test_nothing_checked_is_not_a_pass(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "adamw_step", lambda bench: [])
    assert run("cpu", ["adamw_step"]) == ([], False)


def test_find_device():
    assert find_device("cpu") == torch.device("cpu")
    for wrong in ("cuda:99", "banana", "cpu:1", ""):
        with pytest.raises(ArgumentError, match="device: got"):
            find_device(wrong)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="decode_fp8, lora_linear_fp8, gated_mlp, "):
        run("cpu", ["lora"])
    with pytest.raises(ArgumentError, match="backend"):
        run("cpu", backend="fortran")


def test_backend_that_is_not_there(no_interpreter):
    with pytest.raises(BackendUnavailableError, match="triton"):
        run("cpu", backend="triton")
