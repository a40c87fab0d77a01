"""The rule of `deltadiff verify`: errors, limits, bits, and the rows that it makes."""

import json
import math

import pytest
import torch

from deltadiff.verify.tolerance import Case, Row, differing, format_table, measure, poisoned


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


def test_rows_as_json():
    row = Row("op", "y", "float32", "1", "cpp", 0, math.nan, 0.0, math.inf, 2.0, False)
    values = json.loads(json.dumps(row.as_dict(), allow_nan=False))
    assert (values["error"], values["limit"], values["ratio"]) == ("nan", "inf", None)
