"""Random calls of `delta_update_`, and of its prepared form."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import HALF_DTYPES, NO_ROUNDING, ROUNDINGS, wide_dtype
from ...ops import reference
from ...ops.delta_update import delta_update_, prepare_delta_update
from ..delta_update import FACTORS, wide_weight, written, yardstick
from ..tolerance import Case, Row
from .compare import compare, same_bits, undisturbed
from .draws import RANKS, Dice, Draw
from .memory import DENSE, GuardedAllocations, Layout, Memory

FEW = 64  # elements; the error of fewer numbers is luck
NAMES = ("weight", *FACTORS, "remainder")


@dataclass(frozen=True)
class Call:
    """What a call is, apart from its numbers: ``shapes`` are rows, columns and rank.

    Attributes:
        exact: whether all sums are exact in float32, so that only the last rounding could differ.
        odd: the list in which there are values that are not finite.
        layouts: of each of `NAMES`, for the first weight; the others are dense.
        flag: the dtype of ``apply``; None for none.
    """

    rounding: str
    shapes: list[tuple[int, int, int]]
    layouts: list[dict[str, Layout]]
    adapters: list[torch.dtype]
    prepared: bool
    flag: torch.dtype | None
    exact: bool
    odd: str

    def __str__(self) -> str:
        text = f"{self.rounding} " + ", ".join(f"{n}x{k} r={r}" for n, k, r in self.shapes)
        text += " prepared" * self.prepared + " exact" * self.exact
        text += f" apply {str(self.flag)[6:]}" if self.flag else ""
        text += f" odd {self.odd}" if self.odd else ""
        places = [f"{k}:{v}" for layout in self.layouts for k, v in layout.items() if v != DENSE]
        return " ".join((text, *places))


def draw_call(draw: Draw, dtypes: tuple[torch.dtype, torch.dtype]) -> Call:
    kind, size = draw.kind, draw.size
    half = dtypes[0] in HALF_DTYPES
    rounding = kind.choice(ROUNDINGS) if half else NO_ROUNDING
    ranks = [kind.choice([r for r in RANKS if r <= draw.costs.rank])]
    if kind.chance(0.5):
        ranks += [r for r in RANKS if r <= ranks[0]]
    divisor, dense = kind.choice((1, 1, 8, 16)), kind.chance(0.4)
    prepared, flag = kind.chance(0.3), kind.choice((None, None, torch.bool, torch.float32))
    layouts = [{name: kind.layout(dense or kind.chance(0.4)) for name in NAMES} for _ in range(21)]
    mixed = kind.chance(0.3) and half and not prepared  # adapters of two dtypes in one list
    count = size.choice((1, 1, 2, 3, 5, 11, 20))
    shapes = [draw_shape(size, draw, divisor, ranks, i, count) for i in range(count)]
    if any(n * k < FEW for n, k, _ in shapes):
        shapes.append((8, 8, ranks[0]))
    adapters = [size.choice((dtypes[0], torch.float32)) if mixed else dtypes[1] for _ in shapes]
    odd = size.choice(("weight", *FACTORS)) if size.chance(0.12) else ""
    exact = size.chance(0.4) and not odd and dtypes[0] != torch.float64
    return Call(rounding, shapes, layouts[: len(shapes)], adapters, prepared, flag, exact, odd)


def draw_shape(
    dice: Dice, draw: Draw, divisor: int, ranks: list[int], i: int, count: int
) -> tuple[int, int, int]:
    """(rows, columns, rank) of one weight; the first has the largest rank."""
    rank = ranks[0] if i == 0 else dice.choice(ranks)
    return (*dice.matrix(draw.costs, 8 * rank * count, divisor), rank)


def delta_update_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    call, size = draw_call(draw, dtypes), draw.size
    case.shape += f" {call}"
    memory = Memory(size.choice((math.nan, math.inf, -math.inf)))
    args = _arguments(case, call, dtypes[0], memory)
    before, again, stopped = deepcopy(args), deepcopy(args), deepcopy(args)
    on = None if call.flag is None else torch.ones((), dtype=call.flag, device=case.device)
    with GuardedAllocations() as guard:
        _run(args, call, path, on)
    disturbed = memory.disturbed() + guard.overrun()
    yield from _compare(case, call, dtypes[0], args, before)
    if call.exact and call.rounding != NO_ROUNDING:
        expected = deepcopy(before)
        reference.delta_update_list_ref_(
            expected["weight"], *(expected[key] for key in FACTORS), expected["scale"],
            call.rounding, expected["remainder"] or [], expected["seed"], expected["step"], None,
        )  # fmt: skip
        yield same_bits(case, f"{call.rounding}: bits", written(args), written(expected))
    _run(again, call, path, on)
    yield same_bits(case, "run to run", written(args), written(again))
    yield undisturbed(case, disturbed)

    for t in (t for key in FACTORS for t in stopped[key]):
        t.fill_(math.nan)  # nothing of a skipped step may reach the weights
    off = torch.zeros((), dtype=call.flag or torch.bool, device=case.device)
    _run(stopped, call, path, off)
    yield same_bits(case, "apply=0", written(stopped), written(before))


def _run(args: dict, call: Call, path: str, apply: Tensor | None) -> None:
    if not call.prepared:
        delta_update_(**args, rounding=call.rounding, apply=apply, backend=path)
        return
    lists = [args[key] for key in ("weight", *FACTORS)]
    count = len(args["weight"])
    update = prepare_delta_update(
        path, *lists, args["scale"], call.rounding, args["remainder"] or [], args["seed"],
        range(count), [0] * count,
    )  # fmt: skip
    if apply is not None and apply.dtype == torch.bool and apply.is_cuda:
        apply = apply.view(torch.int8)  # as the optimizer gives it
    update(args["step"], apply)


def _arguments(case: Case, call: Call, dtype: torch.dtype, memory: Memory) -> dict:
    """Arguments of `delta_update_`, each in memory of its own."""
    wide = wide_dtype(dtype)
    lists: dict = {key: [] for key in (*NAMES, "scale")}
    for (n, k, r), layouts, adapter in zip(call.shapes, call.layouts, call.adapters, strict=True):
        if call.exact:  # multiples of 2^-26 below 2^-7: float32 holds every sum of them
            value = case.integers(n, k, most=2**17, dtype=wide) * 2.0**-26
            most = 8 if r <= 64 else 4
            numbers = [case.integers(*s, most=most, dtype=wide) for s in _shapes(n, k, r)]
        else:
            value = case.normal(n, k, std=0.05, dtype=wide)
            numbers = [case.normal(*s, std=0.7, dtype=wide) for s in _shapes(n, k, r)]
        numbers = [t.to(d) for t, d in zip(numbers, (adapter, adapter, wide, wide), strict=True)]
        made = {"weight": value, **dict(zip(FACTORS, numbers, strict=True))}
        if dtype in HALF_DTYPES:
            made["weight"], made["remainder"] = reference.split_remainder(value, dtype)
        if call.odd:
            flat = made[call.odd].view(-1)
            for odd in (math.nan, math.inf, -math.inf)[: case.random.randint(1, 3)]:
                flat[case.random.randrange(flat.numel())] = odd
        for key, t in made.items():
            changes = key in ("weight", "remainder")
            lists[key].append(memory.place(t, layouts[key], written=changes))
        lists["scale"].append(2.0**-26 if call.exact else 0.07 * r**-0.5)
    if call.rounding != "remainder":
        lists["remainder"] = None
    seed = case.random.getrandbits(64) - 2**63
    step = torch.tensor(case.random.getrandbits(40), device=case.device)
    return {**lists, "seed": seed, "step": step}


def _shapes(n: int, k: int, r: int) -> tuple[tuple[int, int], ...]:
    return (r, k), (n, r), (r, k), (n, r)


def _compare(case: Case, call: Call, dtype: torch.dtype, args: dict, before: dict) -> Iterator[Row]:
    """The weights against the truth: the small ones together, every other one for itself."""
    numels = [n * k for n, k, _ in call.shapes]
    small = [i for i, numel in enumerate(numels) if numel <= FEW]
    rest = [[i] for i, numel in enumerate(numels) if numel > FEW]
    for which in ([small] if small else []) + rest:
        columns, floors = [], []
        for i in which:
            old = wide_weight(before, i)
            factors = [before[key][i].contiguous() for key in FACTORS]
            eager, truth, floor = yardstick(old, factors, before["scale"][i], dtype, call.rounding)
            columns.append((wide_weight(args, i).to(eager.dtype), eager, truth))
            floors.append(floor)
        output = f"{call.rounding}: W {', '.join(map(str, which))}"
        floor = None if None in floors else max(floors)
        # A product of float32 numbers in several parts makes NaN of infinity.
        tensors = map(list, zip(*columns, strict=True))
        yield compare(case, output, *tensors, floor=floor, exact_kind=False)
