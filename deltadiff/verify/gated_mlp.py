"""The cases of `gated_mlp` behind an RMSNorm whose output it makes again, in `deltadiff verify`."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..ops.gated_mlp import gated_mlp
from ..ops.reference_blocks import ACTIVATIONS, LowRankLinear, gated_mlp_ref, rms_norm_ref
from ..ops.rms_norm import rms_norm
from .tolerance import FORWARD, GRADIENT, Bench, Row, poisoned

EPS, SCALING = 1e-5, 0.7
_TRAINED = {"x": "dx", "lora_A": "dA", "lora_B": "dB", "gate": "dgate", "bias": "dbias"}
Block = Callable[[Tensor, list[LowRankLinear]], Tensor]


def check_gated_mlp(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are tokens, in, inside, out, r, one joint inner layer."""
    shapes = bench.shapes(
        quick=[(64, 48, 80, 48, 16, False), (37, 65, 129, 33, 17, True)],
        full=[(512, 192, 640, 192, 16, False), (9, 48, 200, 40, 16, True)],
        gpu=[
            (1000, 777, 1234, 777, 13, False), (2000, 264, 1032, 264, 64, True),
            (8192, 4096, 14336, 4096, 16, False), (1000, 1032, 2064, 520, 80, False),
        ],
        quick_gpu=[(640, 520, 776, 520, 16, False)],
    )  # fmt: skip
    for number, (tokens, k, i, n, r, joint) in enumerate(shapes):
        activation = ACTIVATIONS[number % len(ACTIVATIONS)]
        for dtypes in bench.dtypes():
            shape = f"{tokens}x{k}x{i}x{n} r={r} {activation}{' joint' * joint}"
            case = bench.case("gated_mlp", dtypes, shape, (i, k, r), False, tokens)
            yield from case.guard(gated_mlp_rows, tokens, k, i, n, r, joint, activation, *dtypes)


def gated_mlp_rows(case, tokens, k, i, n, r, joint, activation, dtype, adapter) -> Iterator[Row]:
    """The rows of one case, with gates and biases."""
    sizes = [(2 * i, k), (n, i)] if joint else [(i, k), (i, k), (n, i)]
    x = case.normal(tokens, k, dtype=dtype)
    weight = case.uniform(k, low=0.5, high=1.5, dtype=dtype)
    layers = [
        LowRankLinear(
            case.normal(*size, std=size[1] ** -0.5, dtype=dtype),
            case.normal(r, size[1], std=size[1] ** -0.5, dtype=adapter),
            case.normal(size[0], r, std=r**-0.5, dtype=adapter),
            case.uniform(r, low=0.5, high=1.5, dtype=adapter),
            case.normal(size[0], dtype=dtype),
            SCALING,
        )
        for size in sizes
    ]
    dy = case.normal(tokens, n, dtype=dtype)

    def ours() -> dict[str, list[Tensor]]:
        backends = [case.backend] * len(layers)

        def block(x: Tensor, layers: list[LowRankLinear]) -> Tensor:
            y = rms_norm(x, weight, EPS)
            return gated_mlp(y, layers[:-1], layers[-1], activation, backends)

        return block_outputs(block, x, layers, dy, _TRAINED)

    def formula(dtype: torch.dtype | None) -> dict[str, list[Tensor]]:
        def cast(t: Tensor) -> Tensor:
            return t if dtype is None else t.to(dtype)

        def block(x: Tensor, layers: list[LowRankLinear]) -> Tensor:
            y, _ = rms_norm_ref(x, cast(weight), EPS)
            return gated_mlp_ref(y, layers[:-1], layers[-1], activation)

        wide = [LowRankLinear(*map(cast, layer[:5]), layer.scaling) for layer in layers]
        return block_outputs(block, cast(x), wide, cast(dy), _TRAINED)

    with poisoned():
        found = ours()
    again, eager, truth = ours(), formula(None), formula(torch.float64)
    for name, expected in truth.items():
        factor = FORWARD if name == "y" else GRADIENT
        yield case.close(name, found[name], eager[name], expected, factor=factor)
    runs = ([t for tensors in run.values() for t in tensors] for run in (found, again))
    yield case.equal("run to run", *runs)


def block_outputs(
    block: Block, x: Tensor, layers: list[LowRankLinear], dy: Tensor, trained: Mapping[str, str]
) -> dict[str, list[Tensor]]:
    """y, and for each kind of gradient those of all layers.

    ``trained`` has the names of what gets a gradient, and what the rows call that gradient.
    """
    leaves: dict[str, list[Tensor]] = {label: [] for label in trained.values()}

    def leaf(name: str, t: Tensor) -> Tensor:
        if name not in trained:
            return t.detach()
        leaves[trained[name]].append(t.detach().requires_grad_())
        return leaves[trained[name]][-1]

    x = leaf("x", x)
    new = [
        layer._replace(
            **{
                name: leaf(name, t)
                for name in LowRankLinear._fields[1:-1]
                if (t := getattr(layer, name)) is not None
            }
        )
        for layer in layers
    ]
    with torch.enable_grad():
        y = block(x, new)
        found = iter(torch.autograd.grad(y, [t for kind in leaves.values() for t in kind], dy))
    return {
        "y": [y.detach()],
        **{name: [next(found) for _ in kind] for name, kind in leaves.items()},
    }
