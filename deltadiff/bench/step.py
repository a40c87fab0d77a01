"""`deltadiff bench step`: the optimizer step of Delta-LoRA, its parts and the whole.

The floor of each case is a copy of as many bytes as the case has to read and write. It is never
captured in a CUDA graph, where copies take longer.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import ROUNDINGS, dtype_name
from ..layers.swap import swap_
from ..ops.adamw_step import adamw_step_
from ..ops.delta_update import delta_update_
from ..optim.delta_lora import DeltaLoRA
from .timing import Case, Variant, synchronize

VARIANTS = ("copy", "deltadiff", "naive", "addmm", "torch-fused", "torch-foreach")


HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


SCALE, UPDATE_RATIO, ALPHA = 1e-3, 0.5, 16.0


COPY_BYTES = 2**30  # most that one copy of the floor reads


SQUARE = (4096, 4096)


# Attention q, k, v, o and the MLP's gate, up, down, each (out, in), of 32 layers.
LLAMA_7B = 32 * (4 * [SQUARE] + 2 * [(11008, 4096)] + [(4096, 11008)])


Shapes = Sequence[tuple[int, int]]  # (out, in) of each weight


def step_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of the README's table: 64 layers of 4096 x 4096 (on a CPU 4), r = 8."""
    gpu = device.type == "cuda"
    side = 256 if quick and not gpu else 4096
    shapes = [(side, side)] * (64 if gpu else 4)
    r, half, graphs = 8, torch.bfloat16, (False, True)[: 1 + gpu]
    kinds = [(half, rounding) for rounding in ROUNDINGS]
    if not quick:
        kinds += [(torch.float32, None), (torch.float16, "remainder")]
    cases = [delta_update_case(shapes, r, dtype, rounding, gpu) for dtype, rounding in kinds]
    cases += [adamw_case(shapes, r, *how) for how in itertools.product((False, True), graphs)]
    for rounding in ROUNDINGS:
        cases += [step_case(shapes, r, half, rounding, graph) for graph in graphs]
    if gpu and not quick:
        cases += [step_case(LLAMA_7B, r, half, "remainder", g, "Llama-2-7B") for g in (False, True)]
    return cases


def _case(op, shapes, dtype, rounding, graph, floor_bytes, flops, build, **rest) -> Case:
    shape = {"M": None, "K": None, "N": None, **rest.pop("shape")}
    if len(set(shapes)) == 1:
        shape |= {"N": shapes[0][0], "K": shapes[0][1]}
    fields = {
        "op": op, "mode": "step", "graph": graph, "shape": shape, "rounding": rounding,
        "dtype": dtype_name(dtype), "adapter_dtype": "float32",
        "bytes": floor_bytes, "flops": flops, **rest,
    }  # fmt: skip

    def with_floor(device: torch.device) -> dict[str, Variant]:
        torch.manual_seed(0)
        copy = Variant(lambda: copies(floor_bytes, device), capture=False)
        return {"copy": copy, **build(device)}

    return Case(fields, "copy", with_floor)


def copies(moved: int, device: torch.device) -> Callable:
    """A call that reads and writes ``moved`` bytes together, by copying."""
    half = moved // 2
    source = torch.randint(256, (min(half, COPY_BYTES),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    whole, rest = divmod(half, source.numel())

    def copy():
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return copy


def _factors(shapes: Shapes, r: int, device, size: float) -> tuple[list[Tensor], list[Tensor]]:
    """A (r, in) and B (out, r) of every weight."""
    As = [torch.randn(r, k, device=device) * size for _, k in shapes]
    return As, [torch.randn(n, r, device=device) * size for n, _ in shapes]


def _entries(shapes: Shapes, r: int) -> int:
    return sum(r * (n + k) for n, k in shapes)


# ----------------------------------------------------------------- delta_update


def delta_update_case(
    shapes: Shapes, r: int, dtype: torch.dtype, rounding: str | None, graph: bool
) -> Case:
    """W += scale (dB A' + B dA) for every weight.

    Bytes: N K (2 item + 2 item of the remainder) + 8 r (N + K) for the four float32 factors.
    FLOPs: 4 r N K for the product and 2 N K to scale and add it.
    """
    elements = sum(n * k for n, k in shapes)
    each = 2 * dtype.itemsize * (1 + (rounding == "remainder"))
    build = functools.partial(_build_delta_update, shapes, r, dtype, rounding)
    moved = elements * each + 8 * _entries(shapes, r)
    return _case(
        "delta_update", shapes, dtype, rounding, graph, moved, elements * (4 * r + 2), build,
        shape={"layers": len(shapes), "r": r},
    )  # fmt: skip


def _build_delta_update(shapes, r, dtype, rounding, device) -> dict[str, Variant]:
    weights = [(torch.randn(n, k, device=device) * 0.02).to(dtype) for n, k in shapes]
    lora_As, lora_Bs = _factors(shapes, r, device, 1.0)
    delta_As, delta_Bs = _factors(shapes, r, device, 1e-3)

    def ours():
        low = None
        if rounding == "remainder":
            low_dtype = torch.int16 if dtype == torch.bfloat16 else dtype
            low = [torch.zeros_like(w, dtype=low_dtype) for w in weights]
        step = torch.zeros((), dtype=torch.int64, device=device)
        return lambda: delta_update_(
            weights, lora_As, lora_Bs, delta_As, delta_Bs,
            scale=SCALE, rounding=rounding, remainder=low, step=step,
        )  # fmt: skip

    def eager(update: Callable) -> Callable:
        new = [(b, a) for a, b in zip(lora_As, lora_Bs, strict=True)]
        old = [
            (b - db, a - da)
            for a, b, da, db in zip(lora_As, lora_Bs, delta_As, delta_Bs, strict=True)
        ]
        new, old = ([(b.to(dtype), a.to(dtype)) for b, a in pairs] for pairs in (new, old))
        return lambda: update(weights, new, old, SCALE)

    found = {"deltadiff": Variant(ours)}
    if rounding in (None, "nearest"):  # what plain PyTorch does
        own = {"adapter_dtype": dtype_name(dtype)}
        found["naive"] = Variant(lambda: eager(naive_update), own)
        found["addmm"] = Variant(lambda: eager(addmm_update), own)
    return found


def naive_update(weights, new, old, scale: float) -> None:
    """The formula, with two products and a temporary of the size of W."""
    for w, (b1, a1), (b0, a0) in zip(weights, new, old, strict=True):
        w += scale * (b1 @ a1 - b0 @ a0)


def addmm_update(weights, new, old, scale: float) -> None:
    """The least that eager PyTorch can do: one product in place, the factors side by side."""
    for w, (b1, a1), (b0, a0) in zip(weights, new, old, strict=True):
        w.addmm_(torch.cat([b1, -b0], 1), torch.cat([a1, a0]), alpha=scale)


# ------------------------------------------------------------------- adamw_step


def adamw_case(shapes: Shapes, r: int, wants_delta: bool, graph: bool) -> Case:
    """AdamW on all A and B. PyTorch's optimizers do not yield the delta; they are the same in both.

    Bytes an element: 4 (4 reads: p, g, m, v; 3 writes: p, m, v; 1 more for the delta).
    FLOPs: about 15 an element.
    """
    entries = _entries(shapes, r)
    return _case(
        "adamw_step", shapes, torch.float32, None, graph, entries * (28 + 4 * wants_delta),
        15 * entries, functools.partial(_build_adamw, shapes, r, wants_delta, graph),
        shape={"tensors": 2 * len(shapes), "r": r}, delta=wants_delta,
    )  # fmt: skip


def _build_adamw(shapes, r, wants_delta, graph, device) -> dict[str, Variant]:
    params, grads = (
        [t for pair in zip(*_factors(shapes, r, device, 1.0), strict=True) for t in pair]
        for _ in range(2)
    )

    def ours():
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
        "deltadiff": Variant(ours),
        "torch-fused": Variant(lambda: torch_step("fused")),
        "torch-foreach": Variant(lambda: torch_step("foreach")),
    }


# --------------------------------------------------------------- the whole step


def step_case(
    shapes: Shapes, r: int, dtype: torch.dtype, rounding: str, graph: bool, model: str | None = None
) -> Case:
    """`DeltaLoRA.step()`, beside AdamW of PyTorch and an update of W by hand.

    Bytes: those of AdamW with the delta (32 an entry of A and B), those of the update of W, of
    which the factors were just written.
    """
    entries, elements = _entries(shapes, r), sum(n * k for n, k in shapes)
    each = 2 * dtype.itemsize * (1 + (rounding == "remainder"))
    build = functools.partial(_build_step, shapes, r, dtype, rounding, graph)
    return _case(
        "step", shapes, dtype, rounding, graph, entries * 32 + elements * each,
        15 * entries + elements * (4 * r + 2), build,
        shape={"layers": len(shapes), "r": r}, model=model,
    )  # fmt: skip


def _build_step(shapes, r, dtype, rounding, graph, device) -> dict[str, Variant]:
    weights = [torch.randn(n, k, dtype=dtype, device=device).mul_(0.02) for n, k in shapes]

    def ours():
        model = nn.Sequential()
        for w in weights:
            layer = nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(w, requires_grad=False)
            model.append(layer)
        swap_(model, r=r, lora_alpha=ALPHA, adapter_dtype=torch.float32)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)
        optimizer = DeltaLoRA(model, **HYPER, update_ratio=UPDATE_RATIO, rounding=rounding)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", 'rounding="nearest" lost')
            for _ in range(4):  # past the first, which leaves W alone, and past that warning
                optimizer.step()
                synchronize(device)
        return optimizer.step

    def torch_step(update: Callable, **how) -> Callable:
        As, Bs = _factors(shapes, r, device, 0.02)
        pairs = [t.requires_grad_() for pair in zip(As, Bs, strict=True) for t in pair]
        for p in pairs:
            p.grad = torch.randn_like(p)
        kept = [p.detach().clone() for p in pairs]
        optimizer = torch.optim.AdamW(pairs, **HYPER, **how, capturable=graph)
        new, old = (
            [(b.detach(), a.detach()) for a, b in zip(ts[::2], ts[1::2], strict=True)]
            for ts in (pairs, kept)
        )
        scale = UPDATE_RATIO * ALPHA / r

        def step():
            with torch.no_grad():
                torch._foreach_copy_(kept, pairs)
            optimizer.step()
            as_w = ([(b.to(dtype), a.to(dtype)) for b, a in ts] for ts in (new, old))
            update(weights, *as_w, scale)

        return step

    found = {"deltadiff": Variant(ours)}
    if rounding == "nearest":
        found["addmm"] = Variant(lambda: torch_step(addmm_update, fused=True))
        found["naive"] = Variant(lambda: torch_step(naive_update, foreach=True))
    return found
