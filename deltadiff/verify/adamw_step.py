"""The cases of `adamw_step_` in `deltadiff verify`."""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor

from ..ops import reference
from ..ops.adamw_step import adamw_step_
from .tolerance import Bench, Row, poisoned


def check_adamw_step(bench: Bench) -> Iterator[Row]:
    """The rows of every case; one launch updates tensors of all shapes."""
    shapes = bench.shapes(
        quick=[(65, 3), (8, 96), (1,), (37,)],
        full=[(16, 768), (640, 16)],
        gpu=[(16, 4096), (11008, 16), (3, 1234)],
    )
    for dtype, moment in bench.dtypes():
        for loud in (True, False):
            label = f"{len(shapes)} tensors, {'every option' if loud else 'defaults'}"
            case = bench.case("adamw_step", (dtype, moment), label)
            yield from case.guard(adamw_step_rows, shapes, dtype, moment, loud)


def adamw_step_rows(case, shapes, dtype, moment, loud) -> Iterator[Row]:
    """The rows of one case; ``moment`` is the dtype of the moments."""
    call = draw_adamw_step(case, shapes, dtype, moment, loud)
    before, again, skipped = deepcopy(call), deepcopy(call), deepcopy(call)
    with poisoned():
        adamw_step_(**call, backend=case.backend)
    eager = [eager_adamw_step(before, i) for i in range(len(shapes))]
    truth = true_adamw_step(before)
    for j, (output, key) in enumerate(zip(("p'", "m", "v"), STATE, strict=False)):
        yield case.close(output, call[key], [tensors[j] for tensors in eager], truth[key])
    wide = torch.promote_types(dtype, torch.float32)
    moves = zip(call["params"], before["params"], strict=True)
    moves = [new.to(wide) - old.to(wide) for new, old in moves]
    yield case.equal("delta = p' - p", call["deltas"][:-1], moves[:-1])
    anchors = before["params" if loud else "anchors"]
    yield case.equal("anchors", call["anchors"][:-1], anchors[:-1])
    yield case.equal("steps + 1", [call["steps"]], [before["steps"] + 1])
    adamw_step_(**again, backend=case.backend)
    yield case.equal("run to run", *(all_of(c, *STATE, "deltas", "anchors") for c in (call, again)))
    yield case.equal("inputs kept", call["grads"], before["grads"])

    skipped["found_inf"] = skipped["anchor_now"] = torch.ones((), device=case.device)
    for t in skipped["grads"]:
        t.fill_(math.nan)  # nothing of a skipped step may reach the state
    adamw_step_(**skipped, backend=case.backend)
    still = (all_of(c, *STATE, "anchors") for c in (skipped, before))
    yield case.equal("found_inf", *still)
    zeros = [torch.zeros_like(t) for t in skipped["deltas"][:-1]]
    yield case.equal("found_inf: delta = 0", skipped["deltas"][:-1], zeros)


STATE = ("params", "exp_avgs", "exp_avg_sqs", "steps")


def all_of(call: dict, *keys: str) -> list[Tensor]:
    """The tensors of these lists in one list, without the None entries."""
    return [t for key in keys for t in call[key] if t is not None]


def draw_adamw_step(case, shapes, dtype, moment, loud) -> dict:
    """Arguments of `adamw_step_`. Outputs hold NaN; the last tensor has no delta and no anchor.

    loud: every hyper-parameter changes the result by some percent, and every option is used.
    """
    wide = torch.promote_types(dtype, torch.float32)
    scale = 1000.0 if loud else 1.0
    call = {
        "params": [case.normal(*shape, dtype=dtype) for shape in shapes],
        "grads": [case.normal(*shape, std=0.1 * scale, dtype=dtype) for shape in shapes],
        "exp_avgs": [case.normal(*shape, std=0.1, dtype=moment) for shape in shapes],
        "exp_avg_sqs": [
            case.uniform(*shape, low=0.002, high=0.03, dtype=moment) for shape in shapes
        ],
        "steps": torch.tensor([float(10**i) for i in range(len(shapes))], device=case.device),
        "deltas": [torch.full(shape, math.nan, dtype=wide, device=case.device) for shape in shapes],
        "anchors": [
            torch.full(shape, math.nan, dtype=dtype, device=case.device) for shape in shapes
        ],
        "anchor_now": torch.full((), float(loud), device=case.device),
        "lr": 0.5,
    }
    call["deltas"][-1] = call["anchors"][-1] = None
    if moment != torch.float16:  # it cannot hold v = 0.001 g^2 of a first step
        call["steps"][0] = 0
        call["exp_avgs"][0].zero_()
        call["exp_avg_sqs"][0].zero_()
    if loud:
        call.update(lr=0.3, betas=(0.8, 0.95), eps=0.03, weight_decay=0.5)
        call["grad_scale"] = torch.full((1,), scale, device=case.device)
        call["found_inf"] = torch.zeros((), device=case.device)
    return call


def true_adamw_step(call: dict) -> dict:
    """Parameters and moments after the step, in float64."""
    keys = ("params", "exp_avgs", "exp_avg_sqs", "grads")
    state = {key: [t.to(torch.float64, copy=True) for t in call[key]] for key in keys}
    call = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **call, **state}
    none = [None] * len(call["params"])
    reference.adamw_step_list_ref_(
        call["params"], call["grads"], call["exp_avgs"], call["exp_avg_sqs"],
        call["steps"].clone(), call["lr"], *call["betas"], call["eps"], call["weight_decay"],
        none, none, None, call.get("grad_scale"), None, none, None,
    )  # fmt: skip
    return state


def eager_adamw_step(call: dict, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """p', m, v of `torch.optim.AdamW` in the dtype of the moments."""
    grad, m, v = call["grads"][i], call["exp_avgs"][i].clone(), call["exp_avg_sqs"][i].clone()
    param = call["params"][i].to(m.dtype, copy=True)
    param.grad = (grad / call["grad_scale"] if "grad_scale" in call else grad).to(m.dtype)
    hyper = {key: call[key] for key in ("lr", "betas", "eps", "weight_decay") if key in call}
    optimizer = torch.optim.AdamW([param], **hyper)
    optimizer.state[param] = {
        "step": call["steps"][i].to("cpu", copy=True),
        "exp_avg": m,
        "exp_avg_sq": v,
    }
    optimizer.step()
    return param.to(grad.dtype), m, v
