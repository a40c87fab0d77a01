"""Every kernel once with small and odd sizes, for tools that watch what a program does to memory.

python tests/support/sanitizer_suite.py cpu|cuda    prints how many calls it made

benchmarks/sanitizers.py runs it under each tool. It compares nothing, because tests do that; and it
reads no output of the kernels on the GPU, because what TMA stores write is not seen as written by
all of these tools.
"""

import itertools
import sys

import torch
from torch import nn

import deltadiff
from deltadiff import DeltaLoRA, adamw_step_, delta_update_, lora_linear
from deltadiff.checks import HALF_DTYPES, REMAINDER_DTYPES, ROUNDINGS
from deltadiff.ops.backends import why_unavailable
from deltadiff.ops.decode_4bit import FourBit

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Tokens, in, out, rank, entries of the gate. The sizes of the first two fill whole tiles.
SHAPES = (
    (512, 256, 384, 16, None),
    (384, 512, 256, 64, 1),
    (37, 72, 40, 3, 3),
    (5, 200, 136, 8, None),
    (1, 64, 8, 1, None),
)
BACKENDS = {"cuda": ("hopper", "triton"), "cpu": ("cpp",)}


def run_all(device: torch.device) -> int:
    """Run every case; returns how many calls of operations that were."""
    torch.manual_seed(0)
    calls = 0
    for backend, dtype in itertools.product(BACKENDS[device.type], (BF16, F16, F32)):
        if why_unavailable(backend, device, dtype) is not None:
            continue
        for shape in SHAPES:
            calls += linear(*shape, dtype, device, backend)
        calls += linear(*SHAPES[2], dtype, device, backend, dropout=0.25)
        calls += linear(*SHAPES[0], dtype, device, backend, transposed=True)
        for m, k, n, nested in ((16, 192, 80, True), (100, 192, 80, False), (9, 33, 41, True)):
            calls += four_bits(m, k, n, nested, dtype, device, backend)
        if backend != "hopper":  # it has a kernel for `lora_linear` alone
            calls += updates(dtype, device, backend)
            calls += adamw(dtype, device, backend)
    for dtype in (BF16, F16, F32):
        calls += training(dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return calls


def linear(m, k, n, r, entries, dtype, device, backend, dropout=0.0, transposed=False) -> int:
    """A forward and a backward pass with bias, padded rows of x, and a weight as Conv1D has it."""
    from deltadiff.errors import BackendUnavailableError

    x = torch.randn(m, k + 8, device=device, dtype=dtype)[:, :k].requires_grad_()
    weight = torch.randn((k, n) if transposed else (n, k), device=device, dtype=dtype)
    weight = weight.t() if transposed else weight
    a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((r, k), (n, r)))
    gate = None if entries is None else torch.rand(entries, device=device, requires_grad=True)
    bias = torch.randn(n, device=device, dtype=dtype)
    try:
        y = lora_linear(
            x, weight, a, b, scaling=0.5, gate=gate, bias=bias, dropout=dropout, seed=3,
            backend=backend,
        )  # fmt: skip
    except BackendUnavailableError:  # a shape that this kernel leaves to others
        return 0
    leaves = [t for t in (x, a, b, gate) if t is not None]
    torch.autograd.grad(y, leaves, torch.randn(m, n, device=device, dtype=dtype))
    return 2


def four_bits(m, k, n, nested, dtype, device, backend) -> int:
    """A forward and a backward pass over a weight in 4 bits: few tokens, more, and odd sizes."""
    from deltadiff.errors import BackendUnavailableError

    blocks = -(-n * k // 64)
    packed, absmax = (
        torch.randint(256, (size,), device=device, dtype=torch.uint8)
        for size in (-(-n * k // 2), blocks)
    )
    code, scale, scale_code = (torch.rand(s, device=device) for s in (16, -(-blocks // 256), 256))
    scales, sizes = (scale, scale_code, scale[0].clone()), (64, 256)
    if not nested:
        absmax, scales, sizes = absmax.float(), (None, None, None), (64, 0)
    weight = FourBit(packed, absmax, code, *scales, (n, k), *sizes)
    x = torch.randn(m, k, device=device, dtype=dtype, requires_grad=True)
    a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((4, k), (n, 4)))
    try:
        y = lora_linear(x, weight, a, b, scaling=0.5, backend=backend)
    except BackendUnavailableError:
        return 0
    torch.autograd.grad(y, (x, a, b), torch.randn_like(y))
    return 2


def updates(dtype, device, backend) -> int:
    """The update of two weights in each rounding, one of them with strides."""
    roundings = ROUNDINGS if dtype in HALF_DTYPES else (None,)
    for rounding in roundings:
        weights = [torch.randn(64, 96, device=device, dtype=dtype)]
        weights.append(torch.randn(65, 40, device=device, dtype=dtype)[:, 1:38])
        factors = [
            [torch.randn(shape(*w.shape, 3), device=device) for w in weights]
            for shape in (lambda n, k, r: (r, k), lambda n, k, r: (n, r)) * 2
        ]
        low = None
        if rounding == "remainder":
            kind = REMAINDER_DTYPES[dtype]
            low = [torch.zeros(w.shape, dtype=kind, device=device) for w in weights]
        delta_update_(
            weights, *factors, scale=0.01, rounding=rounding, remainder=low, seed=7, step=1,
            backend=backend,
        )  # fmt: skip
    return len(roundings)


def adamw(dtype, device, backend) -> int:
    """A step of tensors of odd sizes, with every option."""
    shapes = (65, 3), (8, 96), (1,), (37,)
    params, grads = ([torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(2))
    moments = [[torch.rand(s, device=device) for s in shapes] for _ in range(2)]
    adamw_step_(
        params, grads, *moments, torch.zeros(len(shapes), device=device),
        lr=1e-3, deltas=[torch.zeros(s, device=device) for s in shapes],
        anchors=[torch.zeros(s, device=device, dtype=dtype) for s in shapes],
        anchor_now=torch.ones((), device=device),
        grad_scale=torch.ones(1, device=device), found_inf=torch.zeros((), device=device),
        backend=backend,
    )  # fmt: skip
    return 1


def training(dtype, device) -> int:
    """Steps of the optimizer, in place and factored, on two layers of different sizes."""
    steps = 3
    for w_update in ("inplace", "factored"):
        model = nn.ModuleDict({"one": nn.Linear(64, 48), "other": nn.Linear(24, 40)})
        model = model.to(device=device, dtype=dtype)
        deltadiff.swap_(model, r=4, target_modules=["one", "other"])
        optimizer = DeltaLoRA(model, lr=1e-3, update_ratio=0.5, w_update=w_update)
        for _ in range(steps):
            inputs = [torch.randn(16, n, device=device, dtype=dtype) for n in (64, 24)]
            outputs = [layer(x) for layer, x in zip(model.values(), inputs, strict=True)]
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
            optimizer.step()
            optimizer.zero_grad()
    return 2 * steps


if __name__ == "__main__":
    print(f"calls: {run_all(torch.device(sys.argv[1]))}", flush=True)
