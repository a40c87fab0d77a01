"""A verifier must be able to fail: operations that are wrong, a little or in one place."""

import itertools
import math

import pytest
import torch

from deltadiff.checks import NO_ROUNDING, ROUNDINGS
from deltadiff.ops import reference
from deltadiff.verify import adamw_step as verify_adamw_step
from deltadiff.verify import delta_update as verify_delta_update
from deltadiff.verify import lora_linear as verify_lora_linear
from deltadiff.verify.delta_update import FACTORS
from deltadiff.verify.run import run
from deltadiff.verify.tolerance import Row, format_table

SEED = 7
ALL_ROUNDINGS = (NO_ROUNDING, *ROUNDINGS)


@pytest.fixture(autouse=True)
def one_thread():
    """The shapes are small: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failed(op: str, **options) -> list[Row]:
    rows, ok = run("cpu", [op], quick=True, seed=SEED, **options)
    wrong = [row for row in rows if not row.ok]
    assert ok == (not wrong)
    return wrong


def names(rows: list[Row]) -> set[str]:
    return {row.output for row in rows}


def limits(op: str, output: str) -> dict[str, float]:
    """Of the unharmed operation: dtype -> largest limit of an output."""
    found: dict[str, float] = {}
    for row in run("cpu", [op], quick=True, seed=SEED)[0]:
        if row.output.endswith(output) and row.worst is not None:
            found[row.dtype] = max(found.get(row.dtype, 0), row.limit)
    return found


def nudge(t: torch.Tensor, limit: dict[str, float]) -> torch.Tensor:
    """Half a limit too far in relative norm (float64 has no value so near: there it is an ulp)."""
    factor = 1 + max(1.5 * limit[str(t.dtype).removeprefix("torch.")], torch.finfo(t.dtype).eps)
    return (t.double() * factor).to(t.dtype) if t.dtype != torch.float64 else t * factor


# ---------------------------------------------------------------- lora_linear


class Harm(torch.autograd.Function):
    """The identity, with a function applied to the value and another to the gradient."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return value(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.gradient(dy), None, None


def same(t: torch.Tensor) -> torch.Tensor:
    return t.clone()


LEAVES = {"dx": "x", "dA": "lora_A", "dB": "lora_B", "dgate": "gate", "dbias": "bias"}
real_lora_linear = verify_lora_linear.lora_linear


def harmed_lora_linear(output, harm):
    """`lora_linear` with one output or gradient put through ``harm``."""

    def function(x, weight, lora_A, lora_B, **options):
        tensors = {"x": x, "lora_A": lora_A, "lora_B": lora_B, **options}
        if output != "y":
            leaf = LEAVES[output]
            tensors[leaf] = Harm.apply(tensors[leaf], same, harm)
        x, lora_A, lora_B = (tensors.pop(key) for key in ("x", "lora_A", "lora_B"))
        y = real_lora_linear(x, weight, lora_A, lora_B, **tensors)
        return Harm.apply(y, harm, same) if output == "y" else y

    return function


@pytest.mark.parametrize("output", ["y", *LEAVES])
def test_lora_linear_slightly_off(output, monkeypatch):
    limit = limits("lora_linear", output)
    harmed = harmed_lora_linear(output, lambda t: nudge(t, limit))
    monkeypatch.setattr(verify_lora_linear, "lora_linear", harmed)
    rows = failed("lora_linear")
    assert names(rows) == {output}
    assert {row.dtype for row in rows} == set(limit)


def one_wrong(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] += 0.3 * t.abs().max()
    return t


def one_nan(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.view(-1)[-1] = math.nan
    return t


def last_row_left_out(t: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(t)
    out[:-1] = t[:-1]
    return out


@pytest.mark.parametrize("output", ["y", *LEAVES])
@pytest.mark.parametrize("harm", [one_wrong, one_nan, last_row_left_out])
def test_lora_linear_wrong_somewhere(output, harm, monkeypatch):
    monkeypatch.setattr(verify_lora_linear, "lora_linear", harmed_lora_linear(output, harm))
    rows = failed("lora_linear")
    assert output in names(rows) <= {output, "run to run", "mask"}  # the mask is read from dx
    assert len([row for row in rows if row.output == output]) == 12  # 3 shapes, 4 dtypes


def without(**changes):
    def function(x, weight, lora_A, lora_B, **options):
        return real_lora_linear(x, weight, lora_A, lora_B, **{**options, **changes})

    return function


@pytest.mark.parametrize(
    "function, outputs",
    [
        (without(scaling=1.0), {"y", "dx", "dA", "dB", "dgate"}),
        (lambda x, w, a, b, **o: without(gate=o["gate"].mean())(x, w, a, b, **o), {"y"}),
        (lambda x, w, a, b, **o: without(bias=o["bias"].roll(1))(x, w, a, b, **o), {"y", "dbias"}),
        (lambda x, w, a, b, **o: real_lora_linear(x, w, a, b, **o).double(), {"y"}),
        (without(dropout=0.0), {"y", "dx", "dA", "dB", "dgate", "mask"}),
        (without(seed=1), {"y", "dx", "dA", "dB", "dgate", "mask"}),
    ],
    ids=[
        "scaling dropped",
        "gate averaged",
        "bias shifted",
        "dtype",
        "no dropout",
        "another mask",
    ],  # fmt: skip
)
def test_lora_linear_wrong_formula(function, outputs, monkeypatch):
    monkeypatch.setattr(verify_lora_linear, "lora_linear", function)
    assert outputs <= names(failed("lora_linear"))


def test_an_operation_that_raises(monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("out of\nshared memory")

    monkeypatch.setattr(verify_lora_linear, "lora_linear", raises)
    rows = failed("lora_linear")
    assert len(rows) == 12
    assert {row.note for row in rows} == {"RuntimeError: out of shared memory"}
    assert "NO RuntimeError: out of shared memory" in format_table(rows)


# ---------------------------------------------------------------- delta_update


real_delta_update = verify_delta_update.delta_update_


def slightly_off(limit):
    def function(**call):
        real_delta_update(**call)
        for i, w in enumerate(call["weight"]):
            if call["remainder"] is None:
                w.copy_(nudge(w, limit))
            else:  # as far off as float32 is accurate
                joined = reference.join_remainder(w, call["remainder"][i])
                factor = 1 + 2 * limit[str(w.dtype).removeprefix("torch.")]
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


# ---------------------------------------------------------------- adamw_step


real_adamw_step = verify_adamw_step.adamw_step_
STATE = {"p'": "params", "m": "exp_avgs", "v": "exp_avg_sqs"}


@pytest.mark.parametrize("output", STATE)
def test_adamw_step_slightly_off(output, monkeypatch):
    limit = limits("adamw_step", output)

    def function(**call):
        real_adamw_step(**call)
        for t in call[STATE[output]]:
            t.copy_(nudge(t, limit))

    monkeypatch.setattr(verify_adamw_step, "adamw_step_", function)
    rows = failed("adamw_step")
    assert {row.dtype for row in rows if row.output == output} == set(limit)
    assert not names(rows) & (STATE.keys() - {output})


def with_changes(**changes):
    def function(**call):
        real_adamw_step(**{**call, **changes})

    return function


def betas_in_float32(**call):
    """1 - beta, and so the bias correction of the first steps, lose five digits."""
    betas = call.pop("betas", (0.9, 0.999))
    real_adamw_step(betas=[torch.tensor(beta).item() for beta in betas], **call)


def no_grad_scale(**call):
    call.pop("grad_scale", None)
    real_adamw_step(**call)


def delta_before_rounding(**call):
    real_adamw_step(**call)
    for delta in call["deltas"]:
        if delta is not None:
            delta.mul_(1 + 1e-6)


def delta_not_written(**call):
    call["deltas"] = [None] * len(call["deltas"])
    real_adamw_step(**call)


def anchor_is_new(**call):
    real_adamw_step(**call)
    for anchor, p in zip(call["anchors"], call["params"], strict=True):
        if anchor is not None and call["anchor_now"]:
            anchor.copy_(p)


def steps_not_counted(**call):
    real_adamw_step(**call)
    call["steps"] -= 1


def found_inf_ignored(**call):
    call.pop("found_inf", None)
    real_adamw_step(**call)


def gradient_unscaled_in_place(**call):
    real_adamw_step(**call)
    for grad in call["grads"]:
        grad.mul_(0.5)


@pytest.mark.parametrize(
    "function, outputs",
    [
        (with_changes(weight_decay=0.0), {"p'"}),
        (with_changes(eps=0.0), {"p'"}),
        (with_changes(lr=0.31), {"p'"}),
        (betas_in_float32, {"p'"}),
        (with_changes(betas=(0.9, 0.95)), {"p'", "m"}),
        (with_changes(betas=(0.8, 0.96)), {"p'", "v"}),
        (no_grad_scale, {"p'", "m", "v"}),
        (delta_before_rounding, {"delta = p' - p"}),
        (delta_not_written, {"delta = p' - p", "found_inf: delta = 0"}),
        (anchor_is_new, {"anchors", "found_inf"}),
        (with_changes(anchor_now=None), {"anchors"}),
        (steps_not_counted, {"steps + 1", "found_inf"}),
        (found_inf_ignored, {"found_inf", "found_inf: delta = 0"}),
        (gradient_unscaled_in_place, {"inputs kept"}),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_adamw_step_wrong(function, outputs, monkeypatch):
    monkeypatch.setattr(verify_adamw_step, "adamw_step_", function)
    assert outputs <= names(failed("adamw_step"))
