"""`deltadiff bench step`: the optimizer step of Delta-LoRA, its parts and the whole.

The parts are in `delta_update` and `adamw_step`; the whole step is here. The floor of each case is
a copy of as many bytes as the case has to read and write.
"""

import functools
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..checks import ROUNDINGS
from ..layers.swap import swap_
from ..optim.delta_lora import DeltaLoRA
from .adamw_step import HYPER, adamw_step_case
from .clocks import synchronize
from .copy_floor import Shapes, copy_case, count_elements, count_entries, random_factors
from .delta_update import delta_update_case, weight_bytes
from .peers import addmm_update, naive_update
from .timing import Case, Variant

VARIANTS = ("copy", "deltadiff", "naive", "addmm", "torch-fused", "torch-foreach")
UPDATE_RATIO, ALPHA, R = 0.5, 16.0, 8
BF16 = torch.bfloat16

SQUARE = (4096, 4096)
# Attention q, k, v, o and the MLP's gate, up, down, each (out, in), of 32 layers.
LLAMA_7B = 32 * (4 * [SQUARE] + 2 * [(11008, 4096)] + [(4096, 11008)])


def step_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of `deltadiff bench step`: those of both parts, then those of the whole."""
    parts = (delta_update_cases, adamw_step_cases, whole_step_cases)
    return [case for cases in parts for case in cases(device, quick)]


def delta_update_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """W's update: bfloat16 in each rounding, then float32 and float16; as a graph on a GPU."""
    kinds = [(BF16, rounding) for rounding in ROUNDINGS]
    if not quick:
        kinds += [(torch.float32, None), (torch.float16, "remainder")]
    shapes, graph = _shapes(device, quick), device.type == "cuda"
    return [delta_update_case(shapes, R, dtype, rounding, graph) for dtype, rounding in kinds]


def adamw_step_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """AdamW without and with the delta."""
    shapes = _shapes(device, quick)
    how = itertools.product((False, True), _graphs(device))
    return [adamw_step_case(shapes, R, wants_delta, graph) for wants_delta, graph in how]


def whole_step_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """`DeltaLoRA.step()` in each rounding, and on a GPU for all layers of Llama-2-7B."""
    shapes, graphs = _shapes(device, quick), _graphs(device)
    cases = [
        whole_step_case(shapes, R, BF16, rounding, graph)
        for rounding in ROUNDINGS
        for graph in graphs
    ]
    if device.type == "cuda" and not quick:
        llama = functools.partial(whole_step_case, LLAMA_7B, R, BF16, "remainder")
        cases += [llama(graph, "Llama-2-7B") for graph in graphs]
    return cases


def _shapes(device: torch.device, quick: bool) -> Shapes:
    """64 layers of 4096 x 4096; on a CPU 4, small ones for a quick look."""
    gpu = device.type == "cuda"
    return [(256, 256) if quick and not gpu else SQUARE] * (64 if gpu else 4)


def _graphs(device: torch.device) -> tuple[bool, ...]:
    return (False, True) if device.type == "cuda" else (False,)


# --------------------------------------------------------------- the whole step


def whole_step_case(
    shapes: Shapes, r: int, dtype: torch.dtype, rounding: str, graph: bool, model: str | None = None
) -> Case:
    """`DeltaLoRA.step()`, beside AdamW of PyTorch and an update of W by hand.

    Bytes: those of AdamW with the delta (32 for each entry of A and B), and those of W's update
    without its factors, which AdamW has just written.
    """
    entries, elements = count_entries(shapes, r), count_elements(shapes)
    return copy_case(
        "step", shapes, dtype, rounding, graph,
        moved=entries * 32 + elements * weight_bytes(dtype, rounding),
        flops=15 * entries + elements * (4 * r + 2),
        build=functools.partial(_build, shapes, r, dtype, rounding, graph),
        shape={"layers": len(shapes), "r": r}, model=model,
    )  # fmt: skip


def _build(shapes, r, dtype, rounding, graph, device) -> dict[str, Variant]:
    weights = [torch.randn(n, k, dtype=dtype, device=device).mul_(0.02) for n, k in shapes]

    def deltadiff() -> Callable:
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
            # The first step leaves W alone, and one of the next may warn of lost updates.
            for _ in range(4):
                optimizer.step()
                synchronize(device)
        return optimizer.step

    def torch_step(update: Callable, **how) -> Callable:
        As, Bs = random_factors(shapes, r, device, 0.02)
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

        def step() -> None:
            with torch.no_grad():
                torch._foreach_copy_(kept, pairs)
            optimizer.step()
            cast = ([(b.to(dtype), a.to(dtype)) for b, a in ts] for ts in (new, old))
            update(weights, *cast, scale)

        return step

    variants = {"deltadiff": Variant(deltadiff)}
    if rounding == "nearest":
        variants["addmm"] = Variant(lambda: torch_step(addmm_update, fused=True))
        variants["naive"] = Variant(lambda: torch_step(naive_update, foreach=True))
    return variants
