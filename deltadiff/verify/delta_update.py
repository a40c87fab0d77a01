"""The cases of `delta_update_` in `deltadiff verify`."""

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from ..checks import HALF_DTYPES, NO_ROUNDING, ROUNDINGS
from ..ops import reference
from ..ops.delta_update import delta_update_
from .tolerance import Bench, Row, poisoned


def check_delta_update(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are out, in, r, and one launch updates all of them."""
    shapes = bench.shapes(
        quick=[(65, 37, 3), (64, 96, 8), (1, 200, 1)],
        full=[(512, 768, 16)],
        gpu=[(777, 1234, 3), (4096, 4096, 8)],
    )
    for dtypes in bench.dtypes():
        for rounding in ROUNDINGS if dtypes[0] in HALF_DTYPES else (NO_ROUNDING,):
            case = bench.case("delta_update", dtypes, f"{len(shapes)} weights")
            yield from case.guard(
                delta_update_rows, shapes, *dtypes, rounding, output=f"{rounding}: all"
            )


def delta_update_rows(case, shapes, dtype, factor, rounding) -> Iterator[Row]:
    """The rows of one case; ``factor`` is the dtype of A and B."""
    call, holder = draw_delta_update(case, shapes, dtype, factor, rounding)
    before, again, stopped = deepcopy(call), deepcopy(call), deepcopy(call)
    with poisoned():
        delta_update_(**call, backend=case.backend)
    for i, (n, k, r) in enumerate(shapes):
        ours, old = wide_weight(call, i), wide_weight(before, i)
        factors = [before[key][i] for key in FACTORS]
        eager, truth, floor = yardstick(old, factors, call["scale"][i], dtype, rounding)
        ours = ours.to(eager.dtype)
        shape = f"{n}x{k} r={r}"
        yield case.close(f"{rounding}: W", [ours], [eager], [truth], floor=floor, shape=shape)

    exact, _ = draw_delta_update(case, shapes, dtype, factor, rounding, exact=True)
    expected = deepcopy(exact)
    delta_update_(**exact, backend=case.backend)
    reference.delta_update_list_ref_(
        expected["weight"], *(expected[key] for key in FACTORS), expected["scale"], rounding,
        expected["remainder"] or [], expected["seed"], expected["step"], None,
    )  # fmt: skip
    yield case.equal(f"{rounding}: bits", written(exact), written(expected))

    delta_update_(**again, apply=torch.ones((), device=case.device), backend=case.backend)
    yield case.equal(f"{rounding}: run to run", written(call), written(again))
    for t in (t for key in FACTORS for t in stopped[key]):
        t.fill_(math.nan)  # nothing of a skipped step may reach the weights
    off = torch.zeros((), dtype=torch.bool, device=case.device)
    delta_update_(**stopped, apply=off, backend=case.backend)
    yield case.equal(f"{rounding}: apply=0", written(stopped), written(before))
    kept = [[t for key in FACTORS for t in problem[key]] for problem in (call, before)]
    border = torch.cat((holder[:, :1], holder[:, -2:]), 1)
    kept[0].append(border)
    kept[1].append(torch.full_like(border, math.nan))
    yield case.equal(f"{rounding}: inputs kept", *kept)


FACTORS = ("lora_A", "lora_B", "delta_A", "delta_B")


def draw_delta_update(case, shapes, dtype, factor, rounding, exact=False) -> tuple[dict, Tensor]:
    """Arguments of `delta_update_`, and the wider tensor that holds the first weight.

    exact: all values are multiples of 2^-26 below 2^-7, so that float32 holds every sum of them,
    taken in any order. Then only the last rounding of W could differ.
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
    """W, or the float32 that W and its remainder hold together."""
    weight = call["weight"][i]
    if call["remainder"] is None:
        return weight
    return reference.join_remainder(weight, call["remainder"][i])


def written(call: dict) -> list[Tensor]:
    """The tensors that the operation writes."""
    return call["weight"] + (call["remainder"] or [])


def yardstick(
    old: Tensor, factors: list[Tensor], scale: float, dtype: torch.dtype, rounding: str
) -> tuple[Tensor, Tensor, float | None]:
    """(eager PyTorch's W, the truth, the floor of the error) after an update of ``old``.

    ``old`` is W, or the float32 value that W, in ``dtype``, and its remainder hold together.
    """
    truth = reference.delta_update_ref_(
        old.to(torch.float64, copy=True), *(t.double() for t in factors), scale=scale
    )
    if rounding == "stochastic":
        return truth + half_ulp(truth, dtype), truth, torch.finfo(dtype).eps / 2
    if rounding == "remainder":
        factors = [t.float() for t in factors]
    return eager_delta_update(old, *factors, scale), truth, None


def eager_delta_update(weight, lora_A, lora_B, delta_A, delta_B, scale) -> Tensor:
    """The update as one writes it in PyTorch, from the factors before and after the step."""
    old_A, old_B = (lora_A - delta_A).to(lora_A.dtype), (lora_B - delta_B).to(lora_B.dtype)
    weight = weight.clone()
    weight += scale * (lora_B @ lora_A - old_B @ old_A)
    return weight


def half_ulp(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest standard deviation of a stochastic rounding, in place of eager PyTorch's error.

    Between two neighbours at a distance of u, a value at the fraction f takes the upper one with
    probability f, so the variance is f (1 - f) u^2 and the standard deviation at most u / 2. Twice
    that is u, which no single rounding exceeds.
    """
    info = torch.finfo(dtype)
    u = torch.ldexp(torch.full_like(truth, info.eps), torch.frexp(truth).exponent - 1)
    return u.clamp(min=info.smallest_normal * info.eps) / 2
