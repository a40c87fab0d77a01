"""`deltadiff verify` must be able to fail: `lora_linear`, wrong by a little or in one place."""

import math

import pytest
import torch
from verify_runs import failed, limits, names, nudge

from deltadiff.verify import lora_linear as verify_lora_linear
from deltadiff.verify.tolerance import format_table


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
