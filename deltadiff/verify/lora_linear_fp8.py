"""The cases of `lora_linear` by backends "fp8" and "scaled_mm" in `deltadiff verify`."""

from collections.abc import Iterator

import torch

from ..checks import HALF_DTYPES
from ..ops.lora_linear import lora_linear
from ..ops.lora_linear_passes import columns_of_scale
from ..ops.reference_fp8 import lora_linear_fp8_ref
from .decode_fp8 import draw_fp8
from .lora_linear import lora_linear_outputs
from .tolerance import FORWARD, GRADIENT, Bench, Row, poisoned


def check_lora_linear_fp8(bench: Bench) -> Iterator[Row]:
    """The rows of every case; shapes are tokens, in, out, r, gate; the sides of a block, 0 for all.

    The truth has the same activations in FP8, so what is measured is all other rounding.
    """
    shapes = bench.shapes(
        quick=[(260, 144, 80, 8, 0, 128, 128), (300, 160, 272, 3, 3, 1, 0)],
        full=[(512, 640, 768, 16, 1, 0, 0), (300, 1296, 1040, 24, 0, 1, 0)],
        gpu=[
            (1000, 5200, 464, 24, 0, 128, 128), (512, 1536, 2064, 128, 0, 0, 0),
            (8192, 4096, 4096, 16, 16, 128, 128), (8192, 4096, 11008, 16, 0, 0, 0),
            (8192, 11008, 4096, 16, 0, 1, 0), (257, 144, 80, 130, 130, 128, 128),
            (777, 2048, 1024, 200, 200, 128, 128),
        ],
        quick_gpu=[(640, 528, 784, 16, 16, 128, 128), (640, 2064, 1152, 16, 0, 0, 0)],
    )  # fmt: skip
    for tokens, k, n, r, gates, rows, columns in shapes:
        block = rows or n, columns or k
        for dtypes in bench.dtypes():
            if dtypes[0] in HALF_DTYPES:
                shape = f"{tokens}x{k}x{n} r={r} of {block[0]}x{block[1]}"
                case = bench.case(
                    "lora_linear_fp8", dtypes, shape, (n, k, r), False, tokens, block
                )  # fmt: skip
                yield from case.guard(fp8_rows, tokens, k, n, r, gates, block, *dtypes)


def fp8_rows(case, tokens, k, n, r, gates, block, dtype, adapter) -> Iterator[Row]:
    """The rows of one case; ``gates`` is the number of entries of the gate, 0 for none."""
    weight = draw_fp8(case, n, k, block, torch.float8_e4m3fn)
    x, dy = case.normal(tokens, k, dtype=dtype), case.normal(tokens, n, dtype=dtype)
    factors = [
        case.normal(r, k, std=k**-0.5, dtype=adapter),
        case.normal(n, r, std=r**-0.5, dtype=adapter),
        case.uniform(gates, low=0.5, high=1.5, dtype=adapter) if gates else None,
        case.normal(n, dtype=dtype) if gates else None,
    ]

    def reference(x, _, lora_A, lora_B, **options):
        columns = columns_of_scale(weight, case.backend)
        return lora_linear_fp8_ref(x, *weight, lora_A, lora_B, columns=columns, **options)

    call = x, weight, *factors, dy
    wide = [t if t is None or t is weight else t.double() for t in call]
    with poisoned():
        ours = lora_linear_outputs(lora_linear, *call, backend=case.backend)
    again = lora_linear_outputs(lora_linear, *call, backend=case.backend)
    eager, truth = (lora_linear_outputs(reference, *given) for given in (call, wide))
    for output, expected in truth.items():
        factor = FORWARD if output == "y" else GRADIENT
        # The tensor cores of sm_90 keep 14 bits of a sum of FP8 products, which shows in float16.
        floor = max(torch.finfo(dtype).eps / 2, 2**-10) if output in ("y", "dx") else None
        columns = [ours[output]], [eager[output]], [expected]
        yield case.close(output, *columns, factor=factor, floor=floor)
    yield case.equal("run to run", list(ours.values()), list(again.values()))
