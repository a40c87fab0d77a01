"""The cases of `lora_linear` in `deltadiff verify`."""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor

from ..ops import reference
from ..ops.lora_linear import lora_linear
from .tolerance import FORWARD, GRADIENT, Bench, Row, poisoned


def check_lora_linear(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are tokens, in, out, r, entries of the gate, dropout."""
    shapes = bench.shapes(
        quick=[(64, 96, 80, 8, 1, 0), (37, 129, 65, 3, 3, 0), (45, 77, 88, 5, 5, 0.1)],
        full=[(1, 48, 200, 1, 0, 0), (512, 768, 640, 16, 16, 0), (512, 768, 640, 16, 16, 0.4)],
        gpu=[
            (1000, 1234, 777, 3, 3, 0), (1000, 136, 64, 33, 33, 0), (2000, 264, 1032, 64, 64, 0),
            (512, 4096, 4096, 16, 0, 0), (2048, 4096, 4096, 16, 0, 0),
            (8192, 4096, 4096, 16, 16, 0), (8192, 4096, 11008, 16, 0, 0),
            (8192, 11008, 4096, 16, 0, 0), (256, 4096, 4096, 16, 0, 0),
            (8192, 4096, 4096, 128, 0, 0), (1000, 1032, 520, 200, 200, 0),
            (8192, 4096, 4096, 16, 16, 0.1),
        ],
        quick_gpu=[(640, 520, 776, 16, 16, 0), (640, 520, 776, 16, 16, 0.1)],
    )  # fmt: skip
    for tokens, k, n, r, gates, p in shapes:
        for dtypes in bench.dtypes():
            shape = f"{tokens}x{k}x{n} r={r}" + (f" p={p}" if p else "")
            case = bench.case("lora_linear", dtypes, shape, (n, k, r), p > 0, tokens)
            yield from case.guard(lora_linear_rows, tokens, k, n, r, gates, p, *dtypes)


def lora_linear_rows(case, tokens, k, n, r, gates, p, dtype, adapter) -> Iterator[Row]:
    """The rows of one case; ``gates`` is the number of entries of the gate, 0 for none."""
    backend = case.backend
    after, before, ours, again, eager, truth = ([] for _ in range(6))
    # The error of a few numbers is luck, so draw until the gate, and T = dy B, have had 32 of them.
    for _ in range(math.ceil(32 / min(gates or 32, tokens * r))):
        inputs = [
            case.normal(tokens, k + 8, dtype=dtype)[:, :k],
            case.normal(n, k, std=k**-0.5, dtype=dtype),
            case.normal(r, k, std=k**-0.5, dtype=adapter),
            case.normal(n, r, std=r**-0.5, dtype=adapter),
            case.uniform(gates, low=0.5, high=1.5, dtype=adapter) if gates else None,
            case.normal(n, dtype=dtype) if gates else None,
            case.normal(tokens, n, dtype=dtype),
        ]
        given = [t for t in inputs if t is not None]
        doubles = [None if t is None else t.double() for t in inputs]
        before += deepcopy(given)
        drop = {"dropout": p, "seed": case.random.getrandbits(64) - 2**63} if p else {}
        with poisoned():
            ours.append(lora_linear_outputs(lora_linear, *inputs, **drop, backend=backend))
        again.append(lora_linear_outputs(lora_linear, *inputs, **drop, backend=backend))
        after += given
        eager.append(lora_linear_outputs(reference.lora_linear_ref, *inputs, **drop))
        truth.append(lora_linear_outputs(reference.lora_linear_ref, *doubles, **drop))
    for output in truth[0]:
        columns = ([draw[output] for draw in draws] for draws in (ours, eager, truth))
        yield case.close(output, *columns, factor=FORWARD if output == "y" else GRADIENT)
    runs = ([t for draw in draws for t in draw.values()] for draws in (ours, again))
    yield case.equal("run to run", *runs)
    if p:
        mask = dropout_mask(inputs, **drop, backend=backend)
        expected = reference.dropout_mask_ref(mask.shape, p, drop["seed"], case.device)
        yield case.equal("mask", [mask], [expected])
    yield case.equal("inputs kept", after, before)


def lora_linear_outputs(
    function, x, weight, lora_A, lora_B, gate, bias, dy, scaling=1.7, **options
) -> dict[str, Tensor]:
    """y, and the gradients of all that has one, by name."""
    leaves = {"dx": x, "dA": lora_A, "dB": lora_B, "dgate": gate, "dbias": bias}
    leaves = {k: t.detach().requires_grad_() for k, t in leaves.items() if t is not None}
    with torch.enable_grad():
        y = function(
            leaves["dx"], weight, leaves["dA"], leaves["dB"], scaling=scaling,
            gate=leaves.get("dgate"), bias=leaves.get("dbias"), **options,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def dropout_mask(inputs: list, **options) -> Tensor:
    """The keep mask: where dx is not zero, if W is zero and every other input is one."""
    x, weight, *others, dy = (None if t is None else torch.ones_like(t) for t in inputs)
    found = lora_linear_outputs(
        lora_linear, x, 0 * weight, *others, dy / dy.shape[1], **options
    )  # fmt: skip
    return found["dx"] != 0
