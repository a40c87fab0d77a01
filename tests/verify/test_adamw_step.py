"""`deltadiff verify` must be able to fail: `adamw_step_`, wrong by a little or in one place."""

import pytest
import torch
from verify_runs import failed, limits, names, nudge

from deltadiff.verify import adamw_step as verify_adamw_step

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
