"""The common parts of the optimizer's cases: a copy as their floor, and random factors.

The copy moves as many bytes as the case has to read and write. It is never captured in a CUDA
graph, where copies take longer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..checks import dtype_name
from .timing import Case, Variant

COPY_BYTES = 2**30  # one copy of the floor reads this much at most

Shapes = Sequence[tuple[int, int]]  # (out, in) of each weight


def copy_case(
    op: str,
    shapes: Shapes,
    dtype: torch.dtype,
    rounding: str | None,
    graph: bool,
    *,
    moved: int,
    flops: int,
    build: Callable[[torch.device], dict[str, Variant]],
    shape: dict,
    **more,
) -> Case:
    """A case whose floor is a copy that reads and writes ``moved`` bytes together.

    Args:
        op, dtype, rounding, flops, more: these go into the records.
        shapes: of the weights; a size that is the same for all of them goes into the records.
        graph: whether the variants, but not the copy, are captured in a CUDA graph.
        build: makes the inputs and the variants, after the random generator was seeded.
        shape: further entries of the records' shape.
    """
    sizes = {"M": None, "K": None, "N": None, **shape}
    if len(set(shapes)) == 1:
        sizes |= {"N": shapes[0][0], "K": shapes[0][1]}
    fields = {
        "op": op, "mode": "step", "graph": graph, "shape": sizes, "rounding": rounding,
        "dtype": dtype_name(dtype), "adapter_dtype": "float32",
        "bytes": moved, "flops": flops, **more,
    }  # fmt: skip

    def with_floor(device: torch.device) -> dict[str, Variant]:
        torch.manual_seed(0)
        copy = Variant(lambda: copies(moved, device), capture=False)
        return {"copy": copy, **build(device)}

    return Case(fields, "copy", with_floor)


def copies(moved: int, device: torch.device) -> Callable[[], None]:
    """A call that reads and writes ``moved`` bytes together, by copying half as many."""
    half = moved // 2
    source = torch.randint(256, (min(half, COPY_BYTES),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, source.numel())

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy


def random_factors(
    shapes: Shapes, r: int, device: torch.device, size: float
) -> tuple[list[Tensor], list[Tensor]]:
    """A (r, in) and B (out, r) of every weight: normal numbers times ``size``, in float32."""
    As = [torch.randn(r, k, device=device) * size for _, k in shapes]
    return As, [torch.randn(n, r, device=device) * size for n, _ in shapes]


def count_entries(shapes: Shapes, r: int) -> int:
    """How many entries A and B of all weights have together."""
    return sum(r * (n + k) for n, k in shapes)


def count_elements(shapes: Shapes) -> int:
    """How many elements all weights have together."""
    return sum(n * k for n, k in shapes)
