"""`deltadiff bench layer --base nf4` or fp8: one LoRA layer over quantised weights, and decoding.

The floor of a layer is that of `layer`, a frozen ``nn.Linear`` in bfloat16. The floor of decoding
is a copy that moves as many bytes. On a GPU all of them run as CUDA graphs: what is asked is what
the GPU has to do, and not how fast a host gives it out.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..layers.quantise import quantise_
from ..ops.decode_4bit import FourBit, decode_4bit
from ..ops.decode_fp8 import Float8, decode_fp8
from .copy_floor import copies
from .layer import LAYERS, MODES, RANK, SHAPES, deltadiff_layer, layer_case, peft_layer
from .timing import Case, Variant

DECODED = ((4096, 4096), (11008, 4096), (14336, 4096))
TOKENS = (1, 16, 32, 64, 256)  # of generation, and of short prompts
CPU_SHAPES = ((512, 1024, 1024),)
UNQUANTISED = ("frozen", "deltadiff-fp32")  # what every base is compared with


@dataclass(frozen=True)
class Base:
    """One way to store the frozen weights of linear layers.

    Attributes:
        op: what records call a layer over such weights.
        bits: what an element of W takes.
        package: what has to be installed for it, or None.
        variants: the names in `layer.LAYERS` of the layers over such weights.
        decode_case: the case of decoding W, from (out, in, dtype, graph).
    """

    op: str
    bits: float
    package: str | None
    variants: tuple[str, ...]
    decode_case: Callable[[int, int, torch.dtype, bool], Case]

    def case(self, m: int, k: int, n: int, r: int, mode: str, graph: bool) -> Case:
        """A layer of M tokens, K in, N out, rank r, beside those in bfloat16."""
        names = UNQUANTISED + self.variants
        stored = self.op, self.bits
        return layer_case(m, k, n, r, mode, torch.bfloat16, graph, names, stored)


def quantised_cases(
    base: Base,
    device: torch.device,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    ranks: Iterable[int] | None = None,
    quick: bool = False,
) -> list[Case]:
    """Layers in both modes, and where no ``shapes`` are given, decoding and few tokens too."""
    on_gpu = device.type == "cuda"
    usual = (SHAPES if on_gpu else CPU_SHAPES)[: 1 if quick else None]
    cases = [
        base.case(*shape, r, mode, on_gpu)
        for shape in shapes or usual
        for r in ranks or (RANK,)
        for mode in MODES
    ]
    if shapes or ranks:
        return cases
    decoded = DECODED[: 1 if quick else None] if on_gpu else [(n, k) for _, k, n in usual]
    dtypes = (torch.bfloat16, torch.float32)
    cases += [base.decode_case(*size, dtype, on_gpu) for size in decoded for dtype in dtypes]
    if on_gpu and not quick:
        cases += [base.case(m, 4096, 4096, RANK, MODES[0], on_gpu) for m in TOKENS]
    return cases


# ------------------------------------------------------------------------- NF4

# Of an element: its number, and its part of the absmax of a block and of that one's scale.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def decode_nf4_case(n: int, k: int, dtype: torch.dtype, graph: bool) -> Case:
    """Decoding W (N, K) to ``dtype``. Bytes: N K (NF4_BITS / 8 + item)."""
    moved = int(n * k * (NF4_BITS / 8 + dtype.itemsize))
    fields = {
        "op": "decode_4bit", "mode": "decode", "graph": graph,
        "shape": {"M": None, "K": k, "N": n}, "rounding": None, "dtype": dtype_name(dtype),
        "adapter_dtype": None, "bytes": moved, "flops": n * k,
    }  # fmt: skip

    def build(device: torch.device) -> dict[str, Variant]:
        import bitsandbytes

        torch.manual_seed(0)
        base = linear_nf4(torch.randn(n, k, device=device).to(torch.bfloat16) / k**0.5)
        weight, state = FourBit.of(base.weight), base.weight.quant_state
        state.dtype, packed = dtype, base.weight.data
        theirs = bitsandbytes.functional.dequantize_4bit
        return {
            "copy": Variant(lambda: copies(moved, device), capture=False),
            "deltadiff-4bit": Variant(lambda: lambda: decode_4bit(weight, dtype)),
            "bnb-4bit": Variant(lambda: lambda: theirs(packed, state)),
        }

    return Case(fields, "copy", build)


def linear_nf4(weight: Tensor) -> nn.Linear:
    """A layer of bitsandbytes with this weight in NF4, its absmax quantised in turn."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, device="meta")
    packed = Params4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.weight = packed.to(weight.device)  # quantises it
    return layer


def _over_nf4(make: Callable, **options) -> Callable:
    return functools.partial(make, linear=linear_nf4, **options)


NF4_LAYERS = {
    "deltadiff-4bit": _over_nf4(deltadiff_layer),
    "bnb-4bit": _over_nf4(deltadiff_layer, backend="reference"),
    "peft-swapped-4bit": _over_nf4(peft_layer, swap=True),
    "peft-4bit": _over_nf4(peft_layer),
}

# ------------------------------------------------------------------------- FP8


def decode_fp8_case(n: int, k: int, dtype: torch.dtype, graph: bool) -> Case:
    """Decoding W (N, K) in blocks of 128 x 128 to ``dtype``. Bytes: N K (1 + item)."""
    moved = n * k * (1 + dtype.itemsize)
    fields = {
        "op": "decode_fp8", "mode": "decode", "graph": graph,
        "shape": {"M": None, "K": k, "N": n}, "rounding": None, "dtype": dtype_name(dtype),
        "adapter_dtype": None, "bytes": moved, "flops": n * k,
    }  # fmt: skip

    def build(device: torch.device) -> dict[str, Variant]:
        torch.manual_seed(0)
        weight = Float8.of(linear_fp8(torch.randn(n, k, device=device).to(torch.bfloat16)))
        return {
            "copy": Variant(lambda: copies(moved, device), capture=False),
            "deltadiff-fp8-decoded": Variant(lambda: lambda: decode_fp8(weight, dtype)),
        }

    return Case(fields, "copy", build)


def linear_fp8(weight: Tensor, granularity: str = "block") -> nn.Module:
    """A layer with this weight in FP8."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    model = nn.Sequential(layer)
    quantise_(model, "fp8", target_modules=lambda *_: True, granularity=granularity)
    return model[0]


def _over_fp8(granularity: str, **options) -> Callable:
    linear = functools.partial(linear_fp8, granularity=granularity)
    return functools.partial(deltadiff_layer, linear=linear, **options)


FP8_LAYERS = {
    "deltadiff-fp8": _over_fp8("tensor", backend="fp8"),
    "deltadiff-fp8-block": _over_fp8("block", backend="fp8"),
    "deltadiff-fp8-decoded": _over_fp8("block"),
}

# To add a base, write the makers of its layers and its case of decoding, and its entry here.
LAYERS |= NF4_LAYERS | FP8_LAYERS
BASES = {
    "nf4": Base(
        "lora_linear_4bit", NF4_BITS, "bitsandbytes", tuple(NF4_LAYERS), decode_nf4_case
    ),
    "fp8": Base("lora_linear_fp8", 8, None, tuple(FP8_LAYERS), decode_fp8_case),
}  # fmt: skip
VARIANTS = tuple(
    dict.fromkeys((*UNQUANTISED, *(name for base in BASES.values() for name in base.variants)))
)
