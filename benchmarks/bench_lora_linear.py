"""lora_linear, forward and forward + backward, against eager PyTorch and a frozen linear layer."""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from deltadiff import lora_linear
from deltadiff.reference import lora_linear_ref

SCALING = 2.0
HALF = torch.bfloat16
if torch.cuda.is_available():
    SHAPES = [(8192, 4096, 4096, 16), (8192, 4096, 11008, 16), (2048, 4096, 4096, 16)]
    DTYPES = [(HALF, HALF), (HALF, torch.float32)]  # of the layer, of the adapters
    # at 2048 tokens the host is slower than the GPU: a CUDA graph leaves the host out
    GRAPHED = [(SHAPES[-1], DTYPES[0], True)]
else:
    SHAPES = [(128, 384, 384, 8), (1024, 768, 768, 16), (512, 2048, 2048, 64)]
    DTYPES = [(torch.float32, torch.float32), (HALF, HALF), (HALF, torch.float32)]
    GRAPHED = []
CASES = [*itertools.product(SHAPES, DTYPES, [False]), *GRAPHED]


def peft_linear(x, weight, lora_A, lora_B):
    """As PEFT does by default: float32 adapters, under autocast to the dtype of the model."""
    with torch.autocast(x.device.type, dtype=x.dtype):
        y = linear(x, weight)
        return y + linear(linear(x.to(lora_A.dtype), lora_A), lora_B) * SCALING


def eager_linear(x, weight, lora_A, lora_B):
    return lora_linear_ref(x, weight, lora_A, lora_B, scaling=SCALING)


def fused_linear(x, weight, lora_A, lora_B):
    return lora_linear(x, weight, lora_A, lora_B, scaling=SCALING)


def frozen_linear(x, weight, lora_A, lora_B):
    return linear(x, weight)


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(("shape", "dtypes", "graph"), CASES)
def bench_lora_linear(compare, device, shape, dtypes, graph, mode):
    """M tokens, K in, N out, rank r; W is frozen, gradients are those of x, A and B.

    FLOPs: forward 2 M N K + 2 M r (K + N), backward 2 M N K + 4 M r (K + N).
    Bytes: forward item (M K + N K + M N), backward item (2 M K + N K + M N); and item r (K + N)
    for the factors, twice with their gradients.
    The floor is a frozen linear layer: forward, and backward to x.
    """
    m, k, n, r = shape
    dtype, adapter_dtype = dtypes
    x = torch.randn(m, k, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    lora_A = (torch.randn(r, k, device=device) / k**0.5).to(adapter_dtype).requires_grad_()
    lora_B = torch.randn(n, r, dtype=adapter_dtype, device=device, requires_grad=True)
    dy = torch.randn(m, n, dtype=dtype, device=device)

    def case(layer):
        inputs = [x] if layer is frozen_linear else [x, lora_A, lora_B]

        def forward():
            with torch.no_grad():
                layer(x, weight, lora_A, lora_B)

        def forward_backward():
            torch.autograd.grad(layer(x, weight, lora_A, lora_B), inputs, dy)

        return forward if mode == "forward" else forward_backward

    variants = {"frozen": case(frozen_linear), "deltadiff": case(fused_linear)}
    variants["eager"] = case(eager_linear)
    if dtype != adapter_dtype:
        variants["peft"] = case(peft_linear)
    compare(
        variants, floor="frozen", op="lora_linear", mode=mode, dtype=dtype,
        adapter_dtype=adapter_dtype, graph=graph, shape={"M": m, "K": k, "N": n, "r": r},
    )  # fmt: skip
