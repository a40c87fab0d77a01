"""Random calls of `advance_counters`, against the same counts in Python's own numbers."""

from collections.abc import Iterator

import torch

from ...ops.step_counters import advance_counters
from ..tolerance import Case, Row
from .compare import same_bits, undisturbed
from .draws import Draw
from .memory import GuardedAllocations, Layout, Memory

WRITTEN = ("iteration", "steps", "flags", "rank_scales")
MOST = (0, 1, 7, 300, 1024, 1025, 2500)  # of each list


def step_counters_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case."""
    kind, size, device = draw.kind, draw.size, case.device
    n, groups, scales = (size.randint(0, size.choice(MOST)) for _ in range(3))
    t = size.choice((0, 1, 5, 2**31 - 1, 2**40))
    near = [t + size.randint(-2, 3) for _ in range(max(groups, scales))]
    numbers = {
        "iteration": (t, torch.int64),
        "steps": ([float(size.choice((0, 1, 999, 2**20))) for _ in range(n)], torch.float32),
        "grads": ([size.choice((0, 2**40 + 16)) for _ in range(n)], torch.int64),
        "firsts": (near[:groups], torch.int64),
        "flags": ([[7, 7]] * groups, torch.int32),
        "rank_scales": ([size.uniform(0, 2) for _ in range(scales)], dtypes[0]),
        "new_scales": ([size.uniform(0, 2) for _ in range(scales)], dtypes[0]),
        "new_from": (near[:scales], torch.int64),
    }
    flag = kind.choice((None, 0.0, 1.0, float("nan")))
    case.shape += f" {n} steps, {groups} groups, {scales} scales, t={t}, found_inf={flag}"
    memory, args = Memory(float("nan")), {}
    for name, (values, dtype) in numbers.items():
        tensor = torch.tensor(values, dtype=dtype, device=device)
        if name == "flags":
            tensor = tensor.view(groups, 2)
        layout = Layout(offset=kind.choice((0, 1)))
        args[name] = memory.place(tensor, layout, written=name in WRITTEN)
    before = {name: t.tolist() for name, t in args.items()}
    found_inf = None
    if flag is not None:
        found_inf = torch.full(kind.choice(((), (1,))), flag, device=device)
    with GuardedAllocations() as guard:
        advance_counters(path, *args.values(), found_inf)
    disturbed = memory.disturbed() + guard.overrun()
    for name, values in _expected(before, done=not flag).items():
        expected = torch.tensor(values, dtype=args[name].dtype, device=device)
        yield same_bits(case, name, [args[name]], [expected.view(args[name].shape)])
    yield undisturbed(case, disturbed)


def _expected(before: dict, done: bool) -> dict:
    """The counts after the step; ``done``: whether it was not skipped."""
    t = before["iteration"] + done
    scales = zip(before["rank_scales"], before["new_scales"], before["new_from"], strict=True)
    steps = zip(before["steps"], before["grads"], strict=True)
    return {
        "iteration": t,
        "steps": [count + (done and grad != 0) for count, grad in steps],
        "flags": [[t >= first, t == first] for first in before["firsts"]],
        "rank_scales": [new if t >= start else now for now, new, start in scales],
    }
