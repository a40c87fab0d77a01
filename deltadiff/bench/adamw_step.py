"""AdamW on A and B of all layers, beside a copy and the optimizers of PyTorch."""

import functools
from collections.abc import Callable

import torch

from ..ops.adamw_step import adamw_step_
from .copy_floor import Shapes, copy_case, count_entries, random_factors
from .timing import Case, Variant

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def adamw_step_case(shapes: Shapes, r: int, wants_delta: bool, graph: bool) -> Case:
    """AdamW on all A and B; with ``wants_delta`` it also yields their changes.

    PyTorch's optimizers cannot do that; they do the same in both cases.

    Bytes per entry: 4 for each of 4 reads (p, g, m, v), 3 writes (p, m, v) and the delta's write.
    FLOPs: about 15 per entry.
    """
    entries = count_entries(shapes, r)
    return copy_case(
        "adamw_step", shapes, torch.float32, None, graph,
        moved=entries * (28 + 4 * wants_delta), flops=15 * entries,
        build=functools.partial(_build, shapes, r, wants_delta, graph),
        shape={"tensors": 2 * len(shapes), "r": r}, delta=wants_delta,
    )  # fmt: skip


def _build(shapes, r, wants_delta, graph, device) -> dict[str, Variant]:
    params, grads = (
        [t for pair in zip(*random_factors(shapes, r, device, 1.0), strict=True) for t in pair]
        for _ in range(2)
    )

    def deltadiff() -> Callable:
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        deltas = [torch.zeros_like(p) for p in params] if wants_delta else None
        steps = torch.zeros(len(params), device=device)
        return lambda: adamw_step_(params, grads, *moments, steps, deltas=deltas, **HYPER)

    def torch_step(how: str) -> Callable:
        own = [p.clone().requires_grad_() for p in params]
        for p, g in zip(own, grads, strict=True):
            p.grad = g
        return torch.optim.AdamW(own, **HYPER, **{how: True}, capturable=graph).step

    return {
        "deltadiff": Variant(deltadiff),
        "torch-fused": Variant(lambda: torch_step("fused")),
        "torch-foreach": Variant(lambda: torch_step("foreach")),
    }
