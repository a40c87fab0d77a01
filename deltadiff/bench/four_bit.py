"""`deltadiff bench layer --base nf4`: one LoRA layer over 4-bit weights, and decoding those.

The floor of a layer is that of `layer`, a frozen ``nn.Linear`` in bfloat16. The floor of decoding
is a copy that moves as many bytes.
"""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..ops.decode_4bit import FourBit, decode_4bit
from .copy_floor import copies
from .layer import LAYERS, MODES, RANK, SHAPES, deltadiff_layer, layer_case, peft_layer
from .timing import Case, Variant

VARIANTS = (
    "frozen", "deltadiff-fp32", "deltadiff-4bit", "bnb-4bit", "peft-swapped-4bit", "peft-4bit",
)  # fmt: skip
DECODED = ((4096, 4096), (11008, 4096), (14336, 4096))
TOKENS = (1, 16, 32, 64, 256)  # of generation, and of short prompts
CPU_SHAPES = ((512, 1024, 1024),)


def four_bit_cases(
    device: torch.device,
    shapes: Iterable[tuple[int, int, int]] | None = None,
    ranks: Iterable[int] | None = None,
    quick: bool = False,
) -> list[Case]:
    """Layers in both modes, and where no ``shapes`` are given, decoding and few tokens too."""
    on_gpu = device.type == "cuda"
    usual = (SHAPES if on_gpu else CPU_SHAPES)[: 1 if quick else None]
    dtype = torch.bfloat16
    cases = [
        layer_case(*shape, r, mode, dtype, names=VARIANTS, weight_bits=BITS)
        for shape in shapes or usual
        for r in ranks or (RANK,)
        for mode in MODES
    ]
    if shapes or ranks:
        return cases
    decoded = DECODED[: 1 if quick else None] if on_gpu else [(n, k) for _, k, n in usual]
    cases += [decode_case(*s, d, on_gpu) for s in decoded for d in (dtype, torch.float32)]
    if on_gpu and not quick:
        few = (
            layer_case(m, 4096, 4096, RANK, MODES[0], dtype, True, VARIANTS, BITS) for m in TOKENS
        )
        cases += few
    return cases


# Of an element: its number, and its part of the absmax of a block and of that one's scale.
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def decode_case(n: int, k: int, dtype: torch.dtype, graph: bool) -> Case:
    """Decoding W (N, K) to ``dtype``. Bytes: N K (BITS / 8 + item)."""
    moved = int(n * k * (BITS / 8 + dtype.itemsize))
    fields = {
        "op": "decode_4bit", "mode": "decode", "graph": graph,
        "shape": {"M": None, "K": k, "N": n}, "rounding": None, "dtype": dtype_name(dtype),
        "adapter_dtype": None, "bytes": moved, "flops": n * k,
    }  # fmt: skip

    def build(device: torch.device) -> dict[str, Variant]:
        import bitsandbytes

        torch.manual_seed(0)
        base = linear_4bit(torch.randn(n, k, device=device).to(torch.bfloat16) / k**0.5)
        weight, state = FourBit.of(base.weight), base.weight.quant_state
        state.dtype, packed = dtype, base.weight.data
        theirs = bitsandbytes.functional.dequantize_4bit
        return {
            "copy": Variant(lambda: copies(moved, device), capture=False),
            "deltadiff-4bit": Variant(lambda: lambda: decode_4bit(weight, dtype)),
            "bnb-4bit": Variant(lambda: lambda: theirs(packed, state)),
        }

    return Case(fields, "copy", build)


def linear_4bit(weight: Tensor) -> nn.Linear:
    """A layer of bitsandbytes with this weight in NF4, its absmax quantised in turn."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    n, k = weight.shape
    layer = Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, device="meta")
    packed = Params4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.weight = packed.to(weight.device)  # quantises it
    return layer


def _over_4_bits(make: Callable, **options) -> Callable:
    return functools.partial(make, linear=linear_4bit, **options)


LAYERS |= {
    "deltadiff-4bit": _over_4_bits(deltadiff_layer),
    "bnb-4bit": _over_4_bits(deltadiff_layer, backend="reference"),
    "peft-swapped-4bit": _over_4_bits(peft_layer, swap=True),
    "peft-4bit": _over_4_bits(peft_layer),
}
