"""`deltadiff verify`: what is right passes; the rows, the rule and the arguments."""

import json
import math

import pytest
import torch

from deltadiff.checks import NO_ROUNDING, ROUNDINGS
from deltadiff.devices import find_device
from deltadiff.errors import ArgumentError, BackendUnavailableError
from deltadiff.ops.dispatch import choose_path
from deltadiff.verify import (
    lora_linear as verify_lora_linear,
)
from deltadiff.verify import (
    run as verify,
)
from deltadiff.verify import (
    tolerance as verify_rule,
)
from deltadiff.verify.delta_update import half_ulp
from deltadiff.verify.run import OPERATIONS, run
from deltadiff.verify.tolerance import Case, Row, differing, format_table, measure, poisoned

SEED = 7
ALL_ROUNDINGS = (NO_ROUNDING, *ROUNDINGS)


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes are small: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_interpreter(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    choose_path.cache_clear()


# ---------------------------------------------------------------- what is right passes


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_passes(op, backend):
    rows, ok = run("cpu", [op], backend, quick=True, seed=SEED)
    assert ok, format_table([row for row in rows if not row.ok])
    assert {row.dtype for row in rows} == {"float32", "bfloat16", "float16", "float64"}
    assert {row.path for row in rows if row.dtype == "float64"} == {"reference"}
    if backend:
        assert {row.path for row in rows} == {backend}


def test_covers_every_output():
    rows, _ = run("cpu", quick=True, seed=SEED)
    close = {(row.op, row.output) for row in rows if row.worst is not None}
    assert close == {
        *(("lora_linear", output) for output in ("y", "dx", "dA", "dB", "dgate", "dbias")),
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


# ---------------------------------------------------------------- the parts


def test_measure():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure([truth + torch.tensor([0.0, 0.4])], [truth]) == pytest.approx((0.08, 0.1))
    both = measure([truth, truth + 1], [truth, truth])
    assert both == pytest.approx(((2 / 50) ** 0.5, 0.25))
    for wrong in (math.nan, math.inf):
        error, worst = measure([truth, torch.tensor([wrong, 4.0])], [truth, truth])
        assert not error < math.inf and not worst < math.inf


def test_nan_yardstick_passes_nothing():
    case = Case("lora_linear", "float32", "", "cpp", torch.device("cpu"), 0)
    truth, nan = torch.ones(4, dtype=torch.float64), torch.full((4,), math.nan)
    assert not case.close("y", [truth.float()], [nan], [truth]).ok
    assert not case.close("y", [truth.float()], [truth.float() * 1.2], [truth]).ok
    assert not case.close("y", [truth.float()], [truth.float()], [torch.zeros_like(truth)]).ok
    assert case.close("y", [truth.float()], [truth.float()], [truth]).ok


def test_differing_is_about_bits():
    t = torch.tensor([0.0, math.nan, 1.0])
    assert differing(t, t.clone()) == 0
    assert differing(t, torch.tensor([-0.0, math.nan, 1.0])) == 1
    assert differing(t, t.double()) == 3
    assert differing(torch.tensor(True), torch.tensor(False)) == 1


def test_poisoned():
    mode = torch.get_deterministic_debug_mode()
    with pytest.raises(RuntimeError, match="inside"), poisoned():
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
        raise RuntimeError("inside")
    assert torch.get_deterministic_debug_mode() == mode


def test_half_ulp():
    values = torch.tensor([1.0, 1.99, 2.0, -3.0, 2.0**-20], dtype=torch.float64)
    expected = torch.tensor([2.0**-8, 2.0**-8, 2.0**-7, 2.0**-7, 2.0**-28], dtype=torch.float64)
    assert half_ulp(values, torch.bfloat16).equal(expected)
    expected = torch.tensor([2.0**-11, 2.0**-11, 2.0**-10, 2.0**-10, 2.0**-25]).double()
    assert half_ulp(values, torch.float16).equal(expected)  # the last is subnormal there


def test_interpreter_bfloat16_is_skipped_with_its_reason():
    def rows(case):
        yield case.equal("y", [torch.ones(1)], [torch.ones(1)])

    def outcome(op, dtype):
        case = Case(op, dtype, "", "triton", torch.device("cpu"), 0)
        (row,) = case.guard(rows)
        return row.ok

    assert outcome("lora_linear", "bfloat16") is None
    assert outcome("delta_update", "bfloat16/float32") is None
    assert outcome("lora_linear", "float16") is True
    assert outcome("adamw_step", "bfloat16") is None
    case = Case("lora_linear", "bfloat16", "", "triton", torch.device("cpu"), 0)
    table = format_table(list(case.guard(rows)))
    assert "skipped: Triton's interpreter gets bfloat16 products and rounding wrong" in table
    assert "0 passed, 0 failed, 1 skipped" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU here")
def test_interpreter():
    rows, ok = run("cpu", ["adamw_step"], "triton", quick=True, seed=SEED)
    assert ok, format_table(rows)
    assert {row.dtype for row in rows if row.ok is None} == {"bfloat16"}
    assert {row.dtype for row in rows if row.path == "triton" and row.ok} == {"float32", "float16"}


def test_what_a_backend_does_not_take_is_skipped(monkeypatch):
    def some(device, dtype, asked, layer):
        if asked == "triton" and layer == (65, 129, 3):
            raise BackendUnavailableError("backend", "'triton': odd", "another")
        return choose_path(device, dtype, None, layer)

    monkeypatch.setattr(verify_rule, "choose_path", some)
    monkeypatch.setattr(verify, "choose_path", some)
    rows, ok = run("cpu", ["lora_linear"], "triton", quick=True, seed=SEED)
    skipped = [row for row in rows if row.ok is None]
    assert ok and len(skipped) == 3 < len(rows)  # not float64, which is the reference's
    assert {(row.shape, row.note) for row in skipped} == {
        ("37x129x65 r=3", "skipped: 'triton': odd")
    }


def test_the_path_of_a_call():
    hopper = pytest.importorskip("deltadiff.kernels.lora_linear.hopper_launch")
    assert verify_lora_linear.path_of_call("hopper", hopper.LEAST_TOKENS) == "hopper"
    assert verify_lora_linear.path_of_call("hopper", hopper.LEAST_TOKENS - 1) == "triton"
    assert verify_lora_linear.path_of_call("cpp", hopper.LEAST_TOKENS) == "cpp"


def test_nothing_checked_is_not_a_pass(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "adamw_step", lambda bench: [])
    assert run("cpu", ["adamw_step"]) == ([], False)


def test_rows_as_json():
    row = Row("op", "y", "float32", "1", "cpp", 0, math.nan, 0.0, math.inf, 2.0, False)
    values = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert (values["error"], values["limit"], values["ratio"]) == ("nan", "inf", None)


def test_find_device():
    assert find_device("cpu") == torch.device("cpu")
    for wrong in ("cuda:99", "banana", "cpu:1", ""):
        with pytest.raises(ArgumentError, match="device: got"):
            find_device(wrong)


def test_bad_arguments():
    with pytest.raises(ArgumentError, match="lora_linear, delta_update, adamw_step"):
        run("cpu", ["lora"])
    with pytest.raises(ArgumentError, match="backend"):
        run("cpu", backend="fortran")


def test_backend_that_is_not_there(no_interpreter):
    with pytest.raises(BackendUnavailableError, match="triton"):
        run("cpu", backend="triton")
