"""The update of W in a step of Delta-LoRA, beside a copy and eager PyTorch."""

import functools
from collections.abc import Callable

import torch

from ..checks import REMAINDER_DTYPES, dtype_name
from ..ops.delta_update import delta_update_
from .copy_floor import Shapes, copy_case, count_elements, count_entries, random_factors
from .peers import addmm_update, naive_update
from .timing import Case, Variant

SCALE = 1e-3


def delta_update_case(
    shapes: Shapes, r: int, dtype: torch.dtype, rounding: str | None, graph: bool
) -> Case:
    """W += scale (dB A' + B dA) for every weight.

    Bytes: N K (2 item + 2 item of the remainder) + 8 r (N + K) for the four float32 factors.
    FLOPs: 4 r N K for the product and 2 N K to scale and add it.
    """
    elements = count_elements(shapes)
    moved = elements * weight_bytes(dtype, rounding) + 8 * count_entries(shapes, r)
    return copy_case(
        "delta_update", shapes, dtype, rounding, graph,
        moved=moved, flops=elements * (4 * r + 2),
        build=functools.partial(_build, shapes, r, dtype, rounding),
        shape={"layers": len(shapes), "r": r},
    )  # fmt: skip


def weight_bytes(dtype: torch.dtype, rounding: str | None) -> int:
    """Bytes that an update reads and writes for each element of W, its remainder included."""
    return 2 * dtype.itemsize * (1 + (rounding == "remainder"))


def _build(shapes, r, dtype, rounding, device) -> dict[str, Variant]:
    weights = [(torch.randn(n, k, device=device) * 0.02).to(dtype) for n, k in shapes]
    lora_As, lora_Bs = random_factors(shapes, r, device, 1.0)
    delta_As, delta_Bs = random_factors(shapes, r, device, 1e-3)

    def deltadiff() -> Callable:
        remainders = None
        if rounding == "remainder":
            remainders = [torch.zeros_like(w, dtype=REMAINDER_DTYPES[dtype]) for w in weights]
        step = torch.zeros((), dtype=torch.int64, device=device)
        return lambda: delta_update_(
            weights, lora_As, lora_Bs, delta_As, delta_Bs,
            scale=SCALE, rounding=rounding, remainder=remainders, step=step,
        )  # fmt: skip

    def eager(update: Callable) -> Callable:
        new = [(b, a) for a, b in zip(lora_As, lora_Bs, strict=True)]
        old = [
            (b - db, a - da)
            for a, b, da, db in zip(lora_As, lora_Bs, delta_As, delta_Bs, strict=True)
        ]
        new, old = ([(b.to(dtype), a.to(dtype)) for b, a in pairs] for pairs in (new, old))
        return lambda: update(weights, new, old, SCALE)

    variants = {"deltadiff": Variant(deltadiff)}
    if rounding in (None, "nearest"):  # plain PyTorch has no other rounding
        own = {"adapter_dtype": dtype_name(dtype)}
        variants["naive"] = Variant(lambda: eager(naive_update), own)
        variants["addmm"] = Variant(lambda: eager(addmm_update), own)
    return variants
