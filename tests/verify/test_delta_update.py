"""`deltadiff verify` must be able to fail: `delta_update_`, wrong by a little or in one place."""

import itertools

import pytest
import torch
from verify_runs import failed, limits, names, nudge

from deltadiff.checks import NO_ROUNDING, ROUNDINGS, dtype_name
from deltadiff.ops import reference
from deltadiff.verify import delta_update as verify_delta_update
from deltadiff.verify.delta_update import FACTORS, half_ulp

ALL_ROUNDINGS = (NO_ROUNDING, *ROUNDINGS)
real_delta_update = verify_delta_update.delta_update_


def slightly_off(limit):
    def function(**call):
        real_delta_update(**call)
        for i, w in enumerate(call["weight"]):
            if call["remainder"] is None:
                w.copy_(nudge(w, limit))
            else:  # as far off as float32 is accurate
                joined = reference.join_remainder(w, call["remainder"][i])
                factor = 1 + 2 * limit[dtype_name(w.dtype)]
                high, low = reference.split_remainder(joined * factor, w.dtype)
                w.copy_(high)
                call["remainder"][i].copy_(low)

    return function


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_delta_update_slightly_off(rounding, monkeypatch):
    limit = limits("delta_update", f"{rounding}: W")
    harmed = slightly_off(limit)

    def function(**call):
        mine = (call["rounding"] or "none") == rounding
        return harmed(**call) if mine else real_delta_update(**call)

    monkeypatch.setattr(verify_delta_update, "delta_update_", function)
    rows = failed("delta_update")
    assert f"{rounding}: W" in names(rows)
    assert {row.output.partition(":")[0] for row in rows} == {rounding}
    assert {row.dtype for row in rows if row.output.endswith(": W")} == set(limit)


def before(harm):
    """`delta_update_` with ``harm(call)`` done to its arguments."""

    def function(**call):
        call = {k: list(v) if isinstance(v, list) else v for k, v in call.items()}
        harm(call)
        real_delta_update(**call)

    return function


def scale_dropped(call):
    call["scale"] = [1.2 * scale for scale in call["scale"]]


def old_A(call):
    call["lora_A"] = [
        (a - da).to(a.dtype) for a, da in zip(call["lora_A"], call["delta_A"], strict=True)
    ]


def factors_rounded(call):
    for key in ("delta_A", "delta_B"):
        call[key] = [t.bfloat16().to(t.dtype) for t in call[key]]


def other_rounding(call):
    if call["rounding"] == "stochastic":
        call["rounding"] = "nearest"


def other_seed(call):
    call["seed"] ^= 1 << 40


def step_not_counted(call):
    call["step"] = torch.zeros_like(call["step"])


def apply_ignored(call):
    call.pop("apply", None)


def row_left_out(**call):
    kept = [w[-1].clone() for w in call["weight"]]
    real_delta_update(**call)
    for w, row in zip(call["weight"], kept, strict=True):
        w[-1] = row


def one_at_a_time(**call):
    """Every weight gets the random bits of the first."""
    lists = ("weight", *FACTORS, "scale", *(("remainder",) if call["remainder"] else ()))
    for i in range(len(call["weight"])):
        real_delta_update(**{**call, **{key: call[key][i : i + 1] for key in lists}})


def remainder_lost(**call):
    real_delta_update(**call)
    for low in call["remainder"] or ():
        low.zero_()


def beyond_the_row(**call):
    real_delta_update(**call)
    w = call["weight"][0]
    w.as_strided((w.shape[0], w.shape[1] + 1), w.stride())[:, -1] = 0


def factor_changed(**call):
    real_delta_update(**call)
    call["delta_B"][0][0, 0] += 1e-3


calls = itertools.count()


def not_repeatable(**call):
    real_delta_update(**call)
    w = call["weight"][-1]
    w[0, 0] *= 1 + torch.finfo(w.dtype).eps * (next(calls) % 5)


@pytest.mark.parametrize(
    "function, outputs",
    [
        (before(scale_dropped), {f"{rounding}: W" for rounding in ALL_ROUNDINGS}),
        (before(old_A), {f"{rounding}: W" for rounding in ALL_ROUNDINGS}),
        (row_left_out, {f"{rounding}: W" for rounding in ALL_ROUNDINGS}),
        (before(factors_rounded), {"none: W", "remainder: W"}),
        (before(other_rounding), {"stochastic: bits"}),
        (before(other_seed), {"stochastic: bits"}),
        (before(step_not_counted), {"stochastic: bits"}),
        (one_at_a_time, {"stochastic: bits"}),
        (remainder_lost, {"remainder: W", "remainder: bits"}),
        (before(apply_ignored), {f"{rounding}: apply=0" for rounding in ALL_ROUNDINGS}),
        (beyond_the_row, {f"{rounding}: inputs kept" for rounding in ALL_ROUNDINGS}),
        (factor_changed, {f"{rounding}: inputs kept" for rounding in ALL_ROUNDINGS}),
        (not_repeatable, {f"{rounding}: run to run" for rounding in ALL_ROUNDINGS}),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_delta_update_wrong(function, outputs, monkeypatch):
    monkeypatch.setattr(verify_delta_update, "delta_update_", function)
    assert outputs <= names(failed("delta_update"))


def test_half_ulp():
    values = torch.tensor([1.0, 1.99, 2.0, -3.0, 2.0**-20], dtype=torch.float64)
    expected = torch.tensor([2.0**-8, 2.0**-8, 2.0**-7, 2.0**-7, 2.0**-28], dtype=torch.float64)
    assert half_ulp(values, torch.bfloat16).equal(expected)
    expected = torch.tensor([2.0**-11, 2.0**-11, 2.0**-10, 2.0**-10, 2.0**-25]).double()
    assert half_ulp(values, torch.float16).equal(expected)  # the last is subnormal there
