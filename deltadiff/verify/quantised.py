"""The rows of a case over weights of few bits: what they are decoded to, and `lora_linear`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from ..ops.lora_linear import lora_linear
from .lora_linear import lora_linear_outputs
from .tolerance import FORWARD, GRADIENT, Row, poisoned


def quantised_rows(
    case: Any,
    weights: Iterable[Any],
    decode: Callable[..., Tensor],
    formula: Callable[[Any, torch.dtype], Tensor],
    tokens: int,
    r: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
) -> Iterator[Row]:
    """The rows of one case with these weights, all of one shape.

    ``formula`` gives the W that ``decode`` must give, bit by bit.
    """
    ours, again, eager, truth = ([] for _ in range(4))
    decoded, expected = [], []
    for weight in weights:
        n, k = weight.shape
        x = case.normal(tokens, k, dtype=dtype)
        factors = [case.normal(r, k, std=k**-0.5, dtype=adapter)]
        factors += [case.normal(n, r, std=r**-0.5, dtype=adapter), None, None]
        dy = case.normal(tokens, n, dtype=dtype)
        w = formula(weight, dtype)
        call, backend = (x, weight, *factors, dy), case.backend
        with poisoned():
            decoded.append(decode(weight, dtype, backend=decoder_of(backend)))
            ours.append(lora_linear_outputs(lora_linear, *call, backend=backend))
        again.append(lora_linear_outputs(lora_linear, *call, backend=backend))
        expected.append(w)
        eager.append(lora_linear_outputs(reference.lora_linear_ref, x, w, *factors, dy))
        wide = [None if t is None else t.double() for t in (x, w, *factors, dy)]
        truth.append(lora_linear_outputs(reference.lora_linear_ref, *wide))
    yield case.equal("W", decoded, expected)
    for output in truth[0]:
        columns = ([draw[output] for draw in draws] for draws in (ours, eager, truth))
        yield case.close(output, *columns, factor=FORWARD if output == "y" else GRADIENT)
    runs = ([t for draw in draws for t in draw.values()] for draws in (ours, again))
    yield case.equal("run to run", *runs)


def decoder_of(backend: str) -> str | None:
    """The backend that decodes for a backend of `lora_linear`; None is the usual one."""
    return {"hopper": "triton", "cpp": None}.get(backend, backend)
