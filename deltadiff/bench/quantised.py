"""`deltadiff bench layer --base`: one LoRA layer over quantised weights, and decoding those.

The floor of a layer is that of `layer`, a frozen ``nn.Linear`` in bfloat16. The floor of decoding
is a copy that moves as many bytes. On a GPU all of them run as CUDA graphs: what is asked is what
the GPU has to do, and not how fast a host gives it out.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..layers.quantise import quantise_
from ..ops.backends import why_unavailable
from ..ops.decode_4bit import FourBit, decode_4bit
from ..ops.decode_fp8 import Float8, decode_fp8
from .copy_floor import copies
from .layer import LAYERS, MODES, RANK, SHAPES, deltadiff_layer, dense, layer_case, peft_layer
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
        package: what has to be installed for it, if anything.
        variants: the names in `layer.LAYERS` of the layers over such weights.
        on_sm_90: those among them that multiply in FP8, which other devices do not.
        decode_case: the case of decoding W, from (out, in, dtype, graph).
    """

    op: str
    bits: float
    package: str | None
    variants: tuple[str, ...]
    decode_case: Callable[[int, int, torch.dtype, bool], Case]
    on_sm_90: tuple[str, ...] = ()

    def cases(
        self, device: torch.device, sizes: Iterable[tuple[int, int, int, int, str]]
    ) -> list[Case]:
        """Layers of M tokens, K in, N out, rank r, beside those in bfloat16, in a mode each."""
        graph = device.type == "cuda"
        left_out = self.on_sm_90 if why_unavailable("fp8", device, torch.bfloat16) else ()
        names = UNQUANTISED + tuple(name for name in self.variants if name not in left_out)
        stored = self.op, self.bits
        return [layer_case(*size, torch.bfloat16, graph, names, stored) for size in sizes]


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
    sizes = itertools.product(shapes or usual, ranks or (RANK,), MODES)
    cases = base.cases(device, [(*shape, r, mode) for shape, r, mode in sizes])
    if shapes or ranks:
        return cases
    decoded = DECODED[: 1 if quick else None] if on_gpu else [(n, k) for _, k, n in usual]
    dtypes = (torch.bfloat16, torch.float32)
    cases += [base.decode_case(*size, dtype, on_gpu) for size in decoded for dtype in dtypes]
    if on_gpu and not quick:
        cases += base.cases(device, [(m, 4096, 4096, RANK, MODES[0]) for m in TOKENS])
    return cases


def _decode_case(
    op: str,
    bits: float,
    n: int,
    k: int,
    dtype: torch.dtype,
    graph: bool,
    variants: Callable[[Tensor], dict[str, Variant]],
) -> Case:
    """Decoding W (N, K), with ``bits`` an element, beside a copy; ``variants`` of W in bfloat16."""
    moved = int(n * k * (bits / 8 + dtype.itemsize))
    fields = {
        "op": op, "mode": "decode", "graph": graph,
        "shape": {"M": None, "K": k, "N": n}, "rounding": None, "dtype": dtype_name(dtype),
        "adapter_dtype": None, "bytes": moved, "flops": n * k,
    }  # fmt: skip

    def build(device: torch.device) -> dict[str, Variant]:
        torch.manual_seed(0)
        w = torch.randn(n, k, device=device).to(torch.bfloat16) / k**0.5
        return {"copy": Variant(lambda: copies(moved, device), capture=False), **variants(w)}

    return Case(fields, "copy", build)


# ------------------------------------------------------------------------- NF4

# Of an element: its number, and its part of the absmax of a block and of that one's scale.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def decode_nf4_case(n: int, k: int, dtype: torch.dtype, graph: bool) -> Case:
    """Decoding W (N, K) to ``dtype``. Bytes: N K (NF4_BITS / 8 + item)."""

    def variants(w: Tensor) -> dict[str, Variant]:
        import bitsandbytes

        base = linear_nf4(w)
        weight, state = FourBit.of(base.weight), base.weight.quant_state
        state.dtype, packed = dtype, base.weight.data
        theirs = bitsandbytes.functional.dequantize_4bit
        return {
            "deltadiff-4bit": Variant(lambda: lambda: decode_4bit(weight, dtype)),
            "bnb-4bit": Variant(lambda: lambda: theirs(packed, state)),
        }

    return _decode_case("decode_4bit", NF4_BITS, n, k, dtype, graph, variants)


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

FP8_BITS = 8 + 32 / 128**2  # of an element: its number, and its part of the scale of a block


def decode_fp8_case(n: int, k: int, dtype: torch.dtype, graph: bool) -> Case:
    """Decoding W (N, K) to ``dtype``. Bytes: N K (FP8_BITS / 8 + item)."""

    def variants(w: Tensor) -> dict[str, Variant]:
        weight = Float8.of(linear_fp8(w))
        return {"deltadiff-fp8-decoded": Variant(lambda: lambda: decode_fp8(weight, dtype))}

    return _decode_case("decode_fp8", FP8_BITS, n, k, dtype, graph, variants)


def linear_fp8(weight: Tensor, granularity: str = "block") -> nn.Linear:
    """A layer with this weight in FP8."""
    model = nn.Sequential(dense(weight))
    quantise_(model, "fp8", target_modules=lambda *_: True, granularity=granularity)
    return model[0]


def _rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in FP8, and the scale of each row."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


class _ScaledMm(torch.autograd.Function):
    """x W^T by ``torch._scaled_mm``, of rows in FP8; W^T is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, quantise, weight, transposed):
        ctx.quantise, ctx.transposed = quantise, transposed
        return _ScaledMm.product(quantise(x), weight)

    @staticmethod
    def backward(ctx, dy):
        return _ScaledMm.product(ctx.quantise(dy), ctx.transposed), None, None, None

    @staticmethod
    def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        return torch._scaled_mm(
            a[0], b[0].T, scale_a=a[1], scale_b=b[1].T, out_dtype=torch.bfloat16
        )


def _frozen_fp8(weight, lora_A, lora_B, dtype):
    quantise = torch.compile(_rows_fp8, dynamic=False)  # eager PyTorch would read x many times
    parts = _rows_fp8(weight), _rows_fp8(weight.T.contiguous())
    return lambda x: _ScaledMm.apply(x, quantise, *parts), []


def _over_fp8(make: Callable, granularity: str, **options) -> Callable:
    linear = functools.partial(linear_fp8, granularity=granularity)
    return functools.partial(make, linear=linear, **options)


FP8_LAYERS = {
    "frozen-fp8": _frozen_fp8,
    "deltadiff-fp8": _over_fp8(deltadiff_layer, "tensor", backend="fp8"),
    "deltadiff-fp8-block": _over_fp8(deltadiff_layer, "block", backend="fp8"),
    "deltadiff-fp8-decoded": _over_fp8(deltadiff_layer, "block"),
    "peft-fp8": _over_fp8(peft_layer, "block"),
}

# To add a base, write the makers of its layers and its case of decoding, and its entry here.
LAYERS |= NF4_LAYERS | FP8_LAYERS
BASES = {
    "nf4": Base(
        "lora_linear_4bit", NF4_BITS, "bitsandbytes", tuple(NF4_LAYERS), decode_nf4_case
    ),
    "fp8": Base(
        "lora_linear_fp8", FP8_BITS, None, tuple(FP8_LAYERS), decode_fp8_case,
        on_sm_90=("frozen-fp8", "deltadiff-fp8", "deltadiff-fp8-block"),
    ),
}  # fmt: skip
VARIANTS = tuple(
    dict.fromkeys((*UNQUANTISED, *(name for base in BASES.values() for name in base.variants)))
)
