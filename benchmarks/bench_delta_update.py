"""delta_update_ on a list of weights, against eager PyTorch and against copying the weights."""

import pytest
import torch

from deltadiff import delta_update_

CASES = [
    (torch.float32, None),
    (torch.bfloat16, "nearest"),
    (torch.bfloat16, "stochastic"),
    (torch.bfloat16, "remainder"),
    (torch.float16, "remainder"),
]
SCALE = 1e-3


@pytest.mark.parametrize(("dtype", "rounding"), CASES)
def bench_delta_update(compare, device, dtype, rounding):
    """Per weight: bytes = N K (read + write) (item + item of the remainder); FLOPs = 4 r N K + N K.

    The factors add 4 r (N + K) items, under 1 % of that. The floor copies as many bytes.
    """
    layers, n, k, r = (64 if device.type == "cuda" else 4), 4096, 4096, 8

    def random(*shape, size=1.0):
        return [torch.randn(shape, device=device) * size for _ in range(layers)]

    weights = [w.to(dtype) for w in random(n, k, size=0.02)]
    lora_As, lora_Bs = random(r, k), random(n, r)
    delta_As, delta_Bs = random(r, k, size=1e-3), random(n, r, size=1e-3)
    low_dtype = torch.int16 if dtype == torch.bfloat16 else dtype
    keeps_remainder = rounding == "remainder"
    remainders = (
        [torch.zeros_like(w, dtype=low_dtype) for w in weights] if keeps_remainder else None
    )
    step = torch.zeros((), dtype=torch.int64, device=device)
    moved = weights + (remainders or [])
    copies = [torch.empty_like(t) for t in moved]
    news = [(b.to(dtype), a.to(dtype)) for a, b in zip(lora_As, lora_Bs, strict=True)]
    olds = [
        ((b - db).to(dtype), (a - da).to(dtype))
        for a, b, da, db in zip(lora_As, lora_Bs, delta_As, delta_Bs, strict=True)
    ]

    def copy():
        for target, source in zip(copies, moved, strict=True):
            target.copy_(source)

    def fused():
        delta_update_(
            weights, lora_As, lora_Bs, delta_As, delta_Bs,
            scale=SCALE, rounding=rounding, remainder=remainders, step=step,
        )  # fmt: skip

    def naive():
        for w, (b1, a1), (b0, a0) in zip(weights, news, olds, strict=True):
            w += SCALE * (b1 @ a1 - b0 @ a0)

    def addmm():  # the least that eager PyTorch can do: one product with the factors side by side
        for w, (b1, a1), (b0, a0) in zip(weights, news, olds, strict=True):
            w.addmm_(torch.cat([b1, -b0], 1), torch.cat([a1, a0]), alpha=SCALE)

    compare(
        {"copy": copy, "deltadiff": fused, "naive": naive, "addmm_": addmm},
        floor="copy", op="delta_update", mode="step", dtype=dtype, rounding=rounding or "none",
        shape={"layers": layers, "M": None, "K": k, "N": n, "r": r},
    )  # fmt: skip
