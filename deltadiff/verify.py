"""Check the operations of a machine against float64, beside eager PyTorch on the same inputs.

`deltadiff.verify_rule` has the rule. The inputs are random and large enough in every term that
leaving one out shows: an update is as large as its weight, a low-rank branch as its base.
"""

import math
import secrets
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from . import reference
from .checks import HALF_DTYPES
from .errors import ArgumentError
from .ops import adamw_step_, delta_update_
from .paths import choose_path
from .verify_lora_linear import check_lora_linear
from .verify_rule import Bench, Row, format_table, poisoned

__all__ = ["OPERATIONS", "Row", "default_device", "find_device", "format_table", "run"]


def run(
    device: str | torch.device,
    ops: Sequence[str] | None = None,
    backend: str | None = None,
    quick: bool = False,
    seed: int | None = None,
) -> tuple[list[Row], bool]:
    """Check operations on ``device``.

    Args:
        device: "cpu", "cuda", "cuda:1".
        ops: names from `OPERATIONS`; None is all of them.
        backend: None checks the one that `choose_path` takes; a name asks for one, and what that
            does not take is skipped. float64 goes through the reference in any case.
        quick: small shapes only, and no factors or moments in float32 beside 16-bit tensors.
        seed: of the inputs; None draws a new one.

    Returns:
        The rows, and whether there was something to check and all of it passed.

    Raises:
        ArgumentError: no such device or operation.
        BackendUnavailableError: ``backend`` cannot run on ``device``.
    """
    bench = Bench(
        find_device(device), backend, quick, secrets.randbits(31) if seed is None else seed
    )
    choose_path(bench.device, torch.bfloat16, backend, (8, 8, 1))  # raises if it runs nothing here
    rows = []
    for op in OPERATIONS if ops is None else ops:
        if op not in OPERATIONS:
            raise ArgumentError("ops", repr(op), f"None or names from {', '.join(OPERATIONS)}")
        rows += OPERATIONS[op](bench)
    checked = [row.ok for row in rows if row.ok is not None]
    return rows, bool(checked) and all(checked)


def default_device() -> str:
    """The name of a GPU if there is one, else of the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for, with its index; raises where there is none."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found = "cuda:0" if str(device) == "cuda" else str(device)
    if found not in there:
        raise ArgumentError("device", repr(str(device)), f"one of {', '.join(there)}")
    return torch.device(found)


# ---------------------------------------------------------------- delta_update


def check_delta_update(bench: Bench) -> Iterator[Row]:
    shapes = bench.shapes(  # out, in, r: one launch for all of them
        quick=[(65, 37, 3), (64, 96, 8), (1, 200, 1)],
        full=[(512, 768, 16)],
        gpu=[(777, 1234, 3), (4096, 4096, 8)],
    )
    for dtypes in bench.dtypes():
        for rounding in reference.ROUNDINGS[1:] if dtypes[0] in HALF_DTYPES else ("none",):
            case = bench.case("delta_update", dtypes, f"{len(shapes)} weights")
            yield from case.guard(
                delta_update_rows, shapes, *dtypes, rounding, output=f"{rounding}: all"
            )


def delta_update_rows(case, shapes, dtype, factor, rounding) -> Iterator[Row]:
    call, holder = draw_delta_update(case, shapes, dtype, factor, rounding)
    before, again, stopped = deepcopy(call), deepcopy(call), deepcopy(call)
    with poisoned():
        delta_update_(**call, backend=case.path)
    for i, (n, k, r) in enumerate(shapes):
        ours, old = wide_weight(call, i), wide_weight(before, i)
        factors = [before[key][i] for key in FACTORS]
        truth = reference.delta_update_ref_(
            old.to(torch.float64, copy=True), *(t.double() for t in factors), scale=call["scale"][i]
        )
        floor = None
        if rounding == "stochastic":
            ours, eager = ours.double(), truth + half_ulp(truth, dtype)
            floor = torch.finfo(dtype).eps / 2
        elif rounding == "remainder":
            eager = eager_delta_update(old, *(t.float() for t in factors), call["scale"][i])
            if dtype == torch.float16:  # the rounding of a remainder, at least half of 2^-24
                floor = 2.0**-22 + 2.0**-25 * truth.numel() ** 0.5 / truth.norm().item()
        else:
            eager = eager_delta_update(old, *factors, call["scale"][i])
        shape = f"{n}x{k} r={r}"
        yield case.close(f"{rounding}: W", [ours], [eager], [truth], floor=floor, shape=shape)

    exact, _ = draw_delta_update(case, shapes, dtype, factor, rounding, exact=True)
    expected = deepcopy(exact)
    delta_update_(**exact, backend=case.path)
    reference.delta_update_list_ref_(
        expected["weight"], *(expected[key] for key in FACTORS), expected["scale"], rounding,
        expected["remainder"] or [], expected["seed"], expected["step"], None,
    )  # fmt: skip
    yield case.equal(f"{rounding}: bits", written(exact), written(expected))

    delta_update_(**again, apply=torch.ones((), device=case.device), backend=case.path)
    yield case.equal(f"{rounding}: run to run", written(call), written(again))
    for t in (t for key in FACTORS for t in stopped[key]):
        t.fill_(math.nan)  # nothing of a step that is left out may arrive
    off = torch.zeros((), dtype=torch.bool, device=case.device)
    delta_update_(**stopped, apply=off, backend=case.path)
    yield case.equal(f"{rounding}: apply=0", written(stopped), written(before))
    kept = [[t for key in FACTORS for t in problem[key]] for problem in (call, before)]
    border = torch.cat((holder[:, :1], holder[:, -2:]), 1)
    kept[0].append(border)
    kept[1].append(torch.full_like(border, math.nan))
    yield case.equal(f"{rounding}: inputs kept", *kept)


FACTORS = ("lora_A", "lora_B", "delta_A", "delta_B")


def draw_delta_update(case, shapes, dtype, factor, rounding, exact=False) -> tuple[dict, Tensor]:
    """Arguments of `delta_update_`, and the wider tensor in which the first weight lies.

    exact: all values are multiples of 2^-26 below 2^-7, so that float32 holds every sum of them,
    in whatever order it is taken, and only the last rounding of W is left to differ.
    """
    wide = torch.promote_types(dtype, torch.float32)
    draw = partial(case.integers, most=8) if exact else partial(case.normal, std=0.7)
    call = {key: [] for key in ("weight", *FACTORS, "scale", "remainder")}
    for n, k, r in shapes:
        value = draw(n, k, dtype=wide) * 0.07
        if exact:
            value = case.integers(n, k, most=2**17, dtype=wide) * 2.0**-26
        low = None
        if dtype in HALF_DTYPES:
            value, low = reference.split_remainder(value, dtype)
        call["weight"].append(value)
        call["remainder"].append(low)
        call["lora_A"].append(draw(r, k, dtype=factor))
        call["lora_B"].append(draw(n, r, dtype=factor))
        call["delta_A"].append(draw(r, k, dtype=wide))
        call["delta_B"].append(draw(n, r, dtype=wide))
        call["scale"].append(2.0**-26 if exact else 0.07 * r**-0.5)
    n, k = call["weight"][0].shape
    holder = torch.full((n, k + 3), math.nan, dtype=dtype, device=case.device)
    holder[:, 1:-2] = call["weight"][0]
    call["weight"][0] = holder[:, 1:-2]
    if rounding != "remainder":
        call["remainder"] = None
    call["rounding"] = None if rounding == "none" else rounding
    call["seed"] = case.random.getrandbits(64) - 2**63
    call["step"] = torch.tensor(case.random.getrandbits(40), device=case.device)
    return call, holder


def wide_weight(call: dict, i: int) -> Tensor:
    """W, or the float32 that it and its remainder stand for."""
    weight = call["weight"][i]
    if call["remainder"] is None:
        return weight
    return reference.join_remainder(weight, call["remainder"][i])


def written(call: dict) -> list[Tensor]:
    return call["weight"] + (call["remainder"] or [])


def eager_delta_update(weight, lora_A, lora_B, delta_A, delta_B, scale) -> Tensor:
    """As it is written without this library: from the factors before and after the step."""
    old_A, old_B = (lora_A - delta_A).to(lora_A.dtype), (lora_B - delta_B).to(lora_B.dtype)
    weight = weight.clone()
    weight += scale * (lora_B @ lora_A - old_B @ old_A)
    return weight


def half_ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest standard deviation of a stochastic rounding, which eager PyTorch has not.

    Of two neighbours u apart, a value at the fraction f takes the upper with probability f: the
    variance is f (1 - f) u^2. Twice this is u, which no single rounding exceeds.
    """
    info = torch.finfo(dtype)
    u = torch.ldexp(torch.full_like(truth, info.eps), torch.frexp(truth).exponent - 1)
    return u.clamp(min=info.smallest_normal * info.eps) / 2


# ---------------------------------------------------------------- adamw_step


def check_adamw_step(bench: Bench) -> Iterator[Row]:
    shapes = bench.shapes(  # one launch for all of them
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
    call = draw_adamw_step(case, shapes, dtype, moment, loud)
    before, again, skipped = deepcopy(call), deepcopy(call), deepcopy(call)
    with poisoned():
        adamw_step_(**call, backend=case.path)
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
    adamw_step_(**again, backend=case.path)
    yield case.equal("run to run", *(all_of(c, *STATE, "deltas", "anchors") for c in (call, again)))
    yield case.equal("inputs kept", call["grads"], before["grads"])

    skipped["found_inf"] = skipped["anchor_now"] = torch.ones((), device=case.device)
    for t in skipped["grads"]:
        t.fill_(math.nan)  # nothing of a step that is left out may arrive
    adamw_step_(**skipped, backend=case.path)
    still = (all_of(c, *STATE, "anchors") for c in (skipped, before))
    yield case.equal("found_inf", *still)
    zeros = [torch.zeros_like(t) for t in skipped["deltas"][:-1]]
    yield case.equal("found_inf: delta = 0", skipped["deltas"][:-1], zeros)


STATE = ("params", "exp_avgs", "exp_avg_sqs", "steps")


def all_of(call: dict, *keys: str) -> list[Tensor]:
    return [t for key in keys for t in call[key] if t is not None]


def draw_adamw_step(case, shapes, dtype, moment, loud) -> dict:
    """Arguments of `adamw_step_`. Outputs hold NaN before; the last tensor has no delta, no anchor.

    loud: every hyper-parameter moves the result by percents, and every option is used.
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
    if moment != torch.float16:  # a first step's v = 0.001 g^2 is too small for it
        call["steps"][0] = 0
        call["exp_avgs"][0].zero_()
        call["exp_avg_sqs"][0].zero_()
    if loud:
        call.update(lr=0.3, betas=(0.8, 0.95), eps=0.03, weight_decay=0.5)
        call["grad_scale"] = torch.full((1,), scale, device=case.device)
        call["found_inf"] = torch.zeros((), device=case.device)
    return call


def true_adamw_step(call: dict) -> dict:
    keys = ("params", "exp_avgs", "exp_avg_sqs", "grads")
    state = {key: [t.to(torch.float64, copy=True) for t in call[key]] for key in keys}
    call = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **call, **state}
    none = [None] * len(call["params"])
    reference.adamw_step_list_ref_(
        call["params"], call["grads"], call["exp_avgs"], call["exp_avg_sqs"],
        call["steps"].clone(), call["lr"], *call["betas"], call["eps"], call["weight_decay"],
        none, none, None, call.get("grad_scale"), None,
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


OPERATIONS = {
    "lora_linear": check_lora_linear,
    "delta_update": check_delta_update,
    "adamw_step": check_adamw_step,
}
