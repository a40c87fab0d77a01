"""Stage 1 of DiffoRA on a stack of blocks so small that a test can compute it by hand."""

import torch
from small_models import Block, Stack

from deltadiff.diffora import Search


def stack(*names: str, dtype=torch.float32) -> Stack:
    """A stack with a block for each argument, whose letters name the block's modules."""
    torch.manual_seed(0)
    return Stack(*map(Block, names)).to(dtype)


def batch(seed: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (10, 6) each; in every dtype the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(10, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def squares(model, pair) -> torch.Tensor:
    """The mean squared error of a model on a `batch`."""
    x, y = pair
    return (model(x) - y).square().mean()


def started(model, steps=2, **options) -> Search:
    """A search after a few inner steps: B is not 0 any more, so the gates have gradients."""
    state = Search(model, r=2, seed=0, **{"lr": 1e-2, **options})
    for i in range(steps):
        state.inner_step(lambda i=i: squares(model, batch(i, model.layers[0].a.weight.dtype)))
    return state


def snapshot(state: Search) -> tuple[dict, tuple[int, int]]:
    """Copies of all tensors of a search, those of its optimizers too, and its place."""
    tensors = {n: p.detach().clone() for n, p in state.trained.items()}
    tensors["logits"] = state.logits.detach().clone()
    for kind, optimizer in (("inner", state.optimizer), ("gate", state.gate_optimizer)):
        for p, values in optimizer.state.items():
            if not isinstance(values, dict):
                continue
            for key, t in values.items():
                if isinstance(t, torch.Tensor):
                    tensors[kind, id(p), key] = t.detach().clone()
    tensors["gates"] = torch.stack([layer.gate for layer in state.layers.values()]).clone()
    return tensors, (state.round, state.index)


def assert_same(one: tuple, other: tuple) -> None:
    """Two snapshots are equal, bit by bit."""
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    for key, t in one[0].items():
        assert torch.equal(t, other[0][key]), key
