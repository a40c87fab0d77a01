"""Blocks of a model in `deltadiff bench layer`: q, k and v behind their norm, and a gated MLP.

The floor is the same block with frozen layers, forward, and backward to its input. ``peak_mib`` is
what a step takes beside weights, input and gradient: mostly what is kept for the backward pass.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..layers.swap import swap_
from .layer import ALPHA, RANK, mixed, set_peft_factors
from .peers import has_peft
from .timing import Case, Variant

VARIANTS = ("frozen", "deltadiff", "deltadiff-layers", "peft", "peft-bf16")
MODE = "forward+backward"


class BlockShape(NamedTuple):
    """A block without its weights.

    Attributes:
        name: what records call it.
        hidden: features of its input.
        layers: (out, in) of each linear layer, by name.
        out: features of all its outputs together.
    """

    name: str
    hidden: int
    layers: Mapping[str, tuple[int, int]]
    out: int


def projections(hidden: int, key_value: int) -> BlockShape:
    """The layers that read what the norm before an attention gives."""
    sizes = {"q_proj": hidden, "k_proj": key_value, "v_proj": key_value}
    layers = {name: (n, hidden) for name, n in sizes.items()}
    return BlockShape("q, k, v", hidden, layers, sum(sizes.values()))


def gated_mlp(hidden: int, inside: int) -> BlockShape:
    """down(silu(gate(x)) * up(x))."""
    into, out = (inside, hidden), (hidden, inside)
    return BlockShape(
        "gated MLP", hidden, {"gate_proj": into, "up_proj": into, "down_proj": out}, hidden
    )


LLAMA_8B = (projections(4096, 1024), gated_mlp(4096, 14336))  # of Llama-3.1-8B
TOKENS = (8192, 2048)
SMALL = (projections(64, 32), gated_mlp(64, 160))  # for a CPU


def block_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """Both blocks of Llama-3.1-8B, or small ones on a CPU; ``quick``: at one number of tokens."""
    if device.type != "cuda":
        return [block_case(shape, 64, RANK, torch.bfloat16) for shape in SMALL]
    numbers = TOKENS[:1] if quick else TOKENS
    return [
        block_case(shape, m, RANK, torch.bfloat16, graph=True)
        for m in numbers
        for shape in LLAMA_8B
    ]


def block_case(shape: BlockShape, m: int, r: int, dtype: torch.dtype, graph: bool = False) -> Case:
    """M tokens through a block whose layers all have rank r.

    FLOPs: of each layer (N, K), 4 M N K + 6 M r (K + N). Bytes that must move: W twice, the input
    twice, its gradient, the outputs and theirs, and the factors three times.
    """
    weights = sum(n * k for n, k in shape.layers.values())
    factors = sum(r * (n + k) for n, k in shape.layers.values())
    moved = 2 * weights + m * (3 * shape.hidden + 2 * shape.out) + 3 * factors
    fields = {
        "op": "block", "block": shape.name, "mode": MODE, "graph": graph,
        "shape": {"M": m, "K": shape.hidden, "N": max(n for n, _ in shape.layers.values()), "r": r},
        "rounding": None, "dtype": dtype_name(dtype), "bytes": moved * dtype.itemsize,
        "flops": 4 * m * weights + 6 * m * factors,
    }  # fmt: skip
    names = [name for name in VARIANTS if has_peft() or not name.startswith("peft")]
    return Case(fields, "frozen", functools.partial(_build, shape, m, r, dtype, names))


def _build(
    shape: BlockShape, m: int, r: int, dtype: torch.dtype, names: Collection[str],
    device: torch.device,
) -> dict[str, Variant]:  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(m, shape.hidden, dtype=dtype, device=device, requires_grad=True)
    weights, pairs = {}, {}
    for name, (n, k) in shape.layers.items():
        weights[name] = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
        pairs[name] = torch.randn(r, k, device=device) / k**0.5, torch.randn(n, r, device=device)

    def variant(name: str) -> Variant:
        adapter_dtype = torch.float32 if name == "peft" else dtype

        def make() -> Callable:
            block = build_block(shape, weights)
            call, trained = MAKERS[name](block, pairs, adapter_dtype)
            with torch.no_grad():
                dys = [torch.randn_like(y) for y in call(x)]
            return lambda: torch.autograd.grad(call(x), [x, *trained], dys)

        return Variant(make, {"adapter_dtype": dtype_name(adapter_dtype)})

    return {name: variant(name) for name in names}


class Projections(nn.Module):
    """q, k and v of what the norm gives, as an attention of Llama computes them."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.norm(x)
        return self.q_proj(y), self.k_proj(y), self.v_proj(y)


def build_block(shape: BlockShape, weights: Mapping[str, Tensor]) -> nn.Module:
    """The block with these weights, frozen, as transformers' Llama has it."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    device, dtype = next((w.device, w.dtype) for w in weights.values())
    if "gate_proj" in weights:
        inside = shape.layers["gate_proj"][0]
        config = LlamaConfig(hidden_size=shape.hidden, intermediate_size=inside)
        with torch.device("meta"):
            block = LlamaMLP(config)
    else:
        block = Projections(LlamaRMSNorm(shape.hidden).to(device, dtype))
    for name, weight in weights.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight)
        setattr(block, name, layer)
    return block.requires_grad_(False)


# ------------------------------------------------------------------------- variants
# Each takes the block, A and B by the name of their layer, and the adapters' dtype. It returns a
# function of x that gives the outputs as a tuple, and all A and B.

Pairs = Mapping[str, tuple[Tensor, Tensor]]
Made = tuple[Callable[[Tensor], tuple[Tensor, ...]], list[Tensor]]


def _call(block: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        y = block(x)
        return y if isinstance(y, tuple) else (y,)

    return call


def _frozen(block: nn.Module, pairs: Pairs, dtype: torch.dtype) -> Made:
    return _call(block), []


def _deltadiff(block: nn.Module, pairs: Pairs, dtype: torch.dtype, lean: bool) -> Made:
    r = next(iter(pairs.values()))[0].shape[0]
    swap_(block, r=r, lora_alpha=ALPHA, adapter_dtype=dtype, lean=lean)
    trained = []
    with torch.no_grad():
        for name, values in pairs.items():
            layer = getattr(block, name)
            for factor, value in zip((layer.lora_A, layer.lora_B), values, strict=True):
                trained.append(factor.copy_(value))
    return _call(block), trained


def _peft(block: nn.Module, pairs: Pairs, dtype: torch.dtype) -> Made:
    from peft import LoraConfig, inject_adapter_in_model

    r = next(iter(pairs.values()))[0].shape[0]
    layer_dtype = next(block.parameters()).dtype
    config = LoraConfig(r=r, lora_alpha=ALPHA, target_modules=list(pairs))
    block, trained = inject_adapter_in_model(config, block), []
    for name, values in pairs.items():
        trained += set_peft_factors(getattr(block, name), *values, dtype)
    return mixed(_call(block), dtype, layer_dtype), trained


MAKERS: dict[str, Callable[[nn.Module, Pairs, torch.dtype], Made]] = {
    "frozen": _frozen,
    "deltadiff": functools.partial(_deltadiff, lean=True),
    "deltadiff-layers": functools.partial(_deltadiff, lean=False),
    "peft": _peft,
    "peft-bf16": _peft,
}
