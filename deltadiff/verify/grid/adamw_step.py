"""Random calls of `adamw_step_`, and of its prepared form, which also takes missing gradients."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch

from ...checks import wide_dtype
from ...ops.adamw_step import adamw_step_, prepare_adamw_step
from ..adamw_step import STATE, all_of, eager_adamw_step, true_adamw_step
from ..tolerance import Case, Row
from .compare import compare, same_bits, undisturbed
from .draws import Dice, Draw
from .memory import DENSE, GuardedAllocations, Layout, Memory

WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "deltas", "anchors")


@dataclass(frozen=True)
class Call:
    """What a call is, apart from its numbers.

    Attributes:
        moments: the dtype of the moments of each tensor.
        layouts: of each tensor, where its gradient lies; ``offset`` is that of all else.
        without: the tensors without delta, without anchor and, in the prepared form, without
            gradient.
        options: lr, betas, eps and weight_decay.
        odd: whether some gradients are not finite.
    """

    shapes: list[tuple[int, ...]]
    moments: list[torch.dtype]
    layouts: list[Layout]
    offset: int
    without: dict[str, set[int]]
    prepared: bool
    options: dict
    scaled: bool
    flagged: bool
    flag_shape: tuple[int, ...]
    anchor_now: torch.dtype | None
    odd: bool

    def __str__(self) -> str:
        text = ", ".join("x".join(map(str, shape)) or "scalar" for shape in self.shapes)
        words = ("prepared", "scaled", "flagged", "odd")
        text += "".join(f" {word}" for word in words if getattr(self, word))
        text += f" offset={self.offset} {self.options}"
        text += "".join(f" no {k} {sorted(found)}" for k, found in self.without.items() if found)
        return text + "".join(f" grad:{layout}" for layout in self.layouts if layout != DENSE)


def draw_call(draw: Draw, dtypes: tuple[torch.dtype, torch.dtype]) -> Call:
    kind, size = draw.kind, draw.size
    wide = wide_dtype(dtypes[0])
    aligned, prepared = kind.chance(0.4), kind.chance(0.4)
    mixed = kind.chance(0.2) and not prepared  # moments of two dtypes in one list
    count = size.choice((1, 2, 3, 5, 11, 20))
    shapes = [_draw_shape(size, draw, 16 if aligned else 1, count) for _ in range(count)]
    moments = [size.choice((dtypes[0], wide)) if mixed else dtypes[1] for _ in shapes]
    kinds = sorted(set(moments), key=str)  # the error of few numbers is luck, so each has 64
    shapes, moments = shapes + [(8, 8)] * len(kinds), moments + kinds
    some = {
        name: {i for i in range(count) if size.chance(share)}
        for name, share in (("delta", 0.3), ("anchor", 0.5), ("grad", 0.2 if prepared else 0))
    }
    options = {
        "lr": size.choice((0.3, 1e-3, 0.0)),
        "betas": size.choice(((0.9, 0.999), (0.8, 0.95), (0.0, 0.99), (0.5, 0.9))),
        "eps": size.choice((1e-8, 0.03)),
        "weight_decay": size.choice((0.0, 0.01, 0.5)),
    }
    return Call(
        shapes=shapes,
        moments=moments,
        layouts=[DENSE if aligned else size.layout(size.chance(0.5)) for _ in shapes],
        offset=0 if aligned else kind.choice((0, 1, 2, 3)),
        without=some,
        prepared=prepared,
        options=options,
        scaled=kind.chance(0.4),
        flagged=kind.chance(0.4),
        flag_shape=kind.choice(((), (1,))),
        anchor_now=kind.choice((None, torch.float32, torch.bool, torch.int32)),
        odd=size.chance(0.1),
    )


def _draw_shape(dice: Dice, draw: Draw, divisor: int, count: int) -> tuple[int, ...]:
    form = dice.random()
    if divisor == 1 and form < 0.05:
        return dice.choice(((), (0,), (0, 5)))
    rows, columns = dice.matrix(draw.costs, 8 * count, divisor)
    if form < 0.2:
        return (rows,)
    return (rows, columns) if form < 0.9 else (dice.between(1, 4), rows, min(columns, 64))


def adamw_step_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    call = draw_call(draw, dtypes)
    case.shape += f" {call}"
    memory = Memory(draw.size.choice((math.nan, math.inf, -math.inf)))
    args = _arguments(case, call, dtypes[0], memory)
    before, again, skipped = deepcopy(args), deepcopy(args), deepcopy(args)
    with GuardedAllocations() as guard:
        _run(args, call, path)
    disturbed = memory.disturbed() + guard.overrun()
    yield from _compare(case, call, args, before)
    _run(again, call, path)
    runs = (all_of(a, *STATE, "deltas", "anchors") for a in (args, again))
    yield same_bits(case, "run to run", *runs)
    yield undisturbed(case, disturbed)

    skipped["found_inf"] = torch.ones(call.flag_shape, device=case.device)
    for t in all_of(skipped, "grads"):
        t.fill_(math.nan)  # nothing of a skipped step may reach the state
    _run(skipped, call, path)
    still = (all_of(a, *STATE, "anchors") for a in (skipped, before))
    yield same_bits(case, "found_inf", *still)
    deltas = all_of(skipped, "deltas")
    yield same_bits(case, "found_inf: delta = 0", deltas, [torch.zeros_like(t) for t in deltas])


def _compare(case: Case, call: Call, args: dict, before: dict) -> Iterator[Row]:
    """The state after the step: of the tensors with a gradient by the rule, of the others as is."""
    used = [i for i, grad in enumerate(before["grads"]) if grad is not None]
    idle = [i for i, grad in enumerate(before["grads"]) if grad is None]
    given = {k: [v[i] for i in used] for k, v in before.items() if k in (*WRITTEN, "grads")}
    given |= {**call.options, "steps": before["steps"][used]}
    given |= {"grad_scale": before["grad_scale"]} if before["grad_scale"] is not None else {}
    eager = [eager_adamw_step(given, i) for i in range(len(used))]
    truth = true_adamw_step(given)
    for j, (output, key) in enumerate(zip(("p'", "m", "v"), STATE, strict=False)):
        for dtype in {args[key][i].dtype for i in used}:  # moments may have two
            mine = [i for i in range(len(used)) if args[key][used[i]].dtype == dtype]
            ours = [args[key][used[i]] for i in mine]
            theirs = [eager[i][j] for i in mine]
            true = [truth[key][i] for i in mine]
            # Of an infinite gradient PyTorch makes NaN or infinity, as beta is above or below 1/2.
            yield compare(case, output, ours, theirs, true, exact_kind=False)
    still = ([a[key][i] for key in STATE[:3] for i in idle] for a in (args, before))
    yield same_bits(case, "without gradient", *still)
    wide = wide_dtype(args["params"][0].dtype)
    moves = zip(args["params"], before["params"], args["deltas"], strict=True)
    moves = [(delta, new.to(wide) - old.to(wide)) for new, old, delta in moves if delta is not None]
    deltas = [torch.where(move.isnan(), 0, t) for t, move in moves]  # one NaN is as good as another
    moves = [torch.where(move.isnan(), 0, move) for _, move in moves]
    yield same_bits(case, "delta = p' - p", deltas, moves)
    anchored = before["anchor_now"] is not None and bool(before["anchor_now"])
    some = [i for i, anchor in enumerate(before["anchors"]) if anchor is not None]
    expected = [before["params" if anchored else "anchors"][i] for i in some]
    yield same_bits(case, "anchors", [args["anchors"][i] for i in some], expected)
    done = before["steps"] + (0 if call.prepared else 1)
    yield same_bits(case, "steps", [args["steps"]], [done])


def _run(args: dict, call: Call, path: str) -> None:
    if not call.prepared:
        adamw_step_(**args, **call.options, backend=path)
        return
    state = [args[key] for key in WRITTEN]
    step = prepare_adamw_step(path, *state, [None] * len(args["params"]))
    options = call.options
    step.set_options(options["lr"], *options["betas"], options["eps"], options["weight_decay"])
    # As the optimizer does it: the kernel reads addresses, the other backends `grad`.
    grads = [None if g is None else g.contiguous() for g in args["grads"]]
    addresses = [0 if g is None else g.data_ptr() for g in grads]
    for p, g in zip(args["params"], grads, strict=True):
        p.grad = g
    column = torch.tensor(addresses, dtype=torch.int64, device=args["steps"].device)
    anchor_now, aligned = args["anchor_now"], not any(address % 16 for address in addresses)
    if anchor_now is not None and anchor_now.dtype == torch.bool:
        anchor_now = anchor_now.to(torch.int32)  # as the optimizer has it
    step(column, aligned, args["steps"], anchor_now, args["grad_scale"], args["found_inf"], None)


def _arguments(case: Case, call: Call, dtype: torch.dtype, memory: Memory) -> dict:
    """The tensors of `adamw_step_`, each in memory of its own; outputs hold NaN."""
    args: dict = {key: [] for key in (*WRITTEN, "grads")}
    scale = 1000.0 if call.scaled else 1.0
    beside = Layout(offset=call.offset)
    low = 0.002  # a moment in float16 cannot hold much smaller ones
    for i, (shape, moment) in enumerate(zip(call.shapes, call.moments, strict=True)):
        grad = case.normal(*shape, std=0.1 * scale, dtype=dtype)
        if call.odd and grad.numel():
            for odd in (math.nan, math.inf, -math.inf):
                grad.view(-1)[case.random.randrange(grad.numel())] = odd
        args["grads"].append(
            None if i in call.without["grad"] else memory.place(grad, call.layouts[i])
        )
        made = {
            "params": case.normal(*shape, dtype=dtype),
            "exp_avgs": case.normal(*shape, std=0.1, dtype=moment),
            "exp_avg_sqs": case.uniform(*shape, low=low, high=0.03, dtype=moment),
            "deltas": torch.full(shape, math.nan, dtype=wide_dtype(dtype), device=case.device),
            "anchors": torch.full(shape, math.nan, dtype=dtype, device=case.device),
        }
        for key in WRITTEN:
            absent = i in call.without.get(key.removesuffix("s"), ())
            args[key].append(None if absent else memory.place(made[key], beside, written=True))
    device = case.device
    counts = [case.random.choice((0, 1, 9, 1000, 10**6)) for _ in call.shapes]
    args["steps"] = torch.tensor(counts, dtype=torch.float32, device=device)
    now = call.anchor_now
    args["anchor_now"] = (
        None if now is None else torch.tensor(case.random.choice((0, 1)), device=device).to(now)
    )
    args["grad_scale"] = torch.full(call.flag_shape, scale, device=device) if call.scaled else None
    args["found_inf"] = torch.zeros(call.flag_shape, device=device) if call.flagged else None
    return args
