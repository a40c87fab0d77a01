"""Calls that can be made again and again with the same inputs, and must give the same bits."""

from collections.abc import Callable

import torch
from delta_update_calls import factors, remainder_like, roundings
from lora_linear_calls import inputs, outputs

from deltadiff import adamw_step_, delta_update_, lora_linear

F32 = torch.float32
Call = Callable[[], list[torch.Tensor]]


def normal(seed: int):
    """Like the fixture `randn`, with another seed."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape, dtype=F32, device="cpu", scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    return make


def linear(path, dtype, seed: int, tokens: int = 40, dropout: float = 0.0, size: int = 64) -> Call:
    """A forward and a backward pass, with a vector gate and a bias."""
    given = inputs(normal(seed), tokens, size, size + 8, 5, dtype, path.device, F32, (5,), True)
    options = {"backend": path.backend, "dropout": dropout, "seed": seed}
    return lambda: list(outputs(lora_linear, *given, **options).values())


def update(path, dtype, seed: int, size: int = 64) -> Call:
    """An update of two weights in each rounding; the second is strided."""
    make = normal(seed)
    shapes = [(size, size + 8, 5), (33, 20, 3)]
    start = [make(n, k, dtype=dtype, device=path.device) for n, k, _ in shapes]
    start[1] = start[1].T.contiguous().T
    number = torch.tensor(3, device=path.device)  # a graph cannot capture its copy to the device
    lists = list(zip(*(factors(make, *s, F32, path.device) for s in shapes), strict=True))

    def run():
        results = []
        for rounding in roundings(dtype):
            weights = [w.clone() for w in start]
            lows = [remainder_like(w) for w in weights] if rounding == "remainder" else None
            options = {"rounding": rounding, "remainder": lows, "seed": seed, "step": number}
            delta_update_(weights, *lists, scale=0.1, backend=path.backend, **options)
            results += weights + (lows or [])
        return results

    return run


def step(path, dtype, seed: int, size: int = 64) -> Call:
    """A step of AdamW on three tensors."""
    make, shapes = normal(seed), [(size, size + 8), (3, 5), (1000,)]
    params, grads = ([make(*s, dtype=dtype, device=path.device) for s in shapes] for _ in range(2))
    moments = [make(*s, device=path.device).abs() for s in shapes]

    def run():
        state = [[t.clone() for t in ts] for ts in (params, moments, moments)]
        deltas = [torch.zeros_like(m) for m in moments]
        steps = torch.ones(len(shapes), device=path.device)
        options = {"lr": 0.1, "deltas": deltas, "backend": path.backend}
        adamw_step_(state[0], grads, *state[1:], steps, **options)
        return [t for ts in (*state, deltas) for t in ts] + [steps]

    return run


def with_dropout(path, dtype, seed: int, **size) -> Call:
    return linear(path, dtype, seed, dropout=0.3, **size)


CALLS = {
    "lora_linear": linear,
    "lora_linear with dropout": with_dropout,
    "delta_update": update,
    "adamw_step": step,
}


def same(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
