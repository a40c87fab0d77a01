"""`deltadiff bench layer`: one LoRA linear layer beside its peers.

The floor is a frozen `nn.Linear` whose input requires a gradient: forward, and backward to x.
The other variants compute the gradients of x, A and B.
"""

import functools
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..layers.swap import swap_
from ..ops.reference import lora_linear_ref
from .peers import has_peft
from .timing import Case, Variant

ALPHA = 16.0
COMPILED = "peft-compiled"
# These have adapters in the dtype of the layer, all others in float32.
UNMIXED = ("frozen", "deltadiff", "eager", "peft-bf16", COMPILED)
VARIANTS = (
    "frozen", "deltadiff", "deltadiff-fp32", "eager", "peft-swapped", "peft", "peft-bf16", COMPILED,
)  # fmt: skip
SWEPT = ("frozen", "deltadiff", "peft", "peft-bf16")  # in the plots over many sizes

# Shapes are (tokens, in, out). With fewer tokens than in SHAPES the host is slower than the GPU;
# those of GRAPHED run as CUDA graphs, which leave the host out.
SHAPES = ((8192, 4096, 4096), (8192, 4096, 11008), (8192, 11008, 4096))
GRAPHED = ((2048, 4096, 4096), (512, 4096, 4096))
TOKENS = (1, 16, 64, 256, 1024, 2048, 8192)
RANKS = (4, 8, 16, 32, 64, 128, 256)
RANK = 16
CPU_SHAPES = ((128, 384, 384, 8), (1024, 768, 768, 16), (512, 2048, 2048, 64))  # and rank
MODES = ("forward", "forward+backward")


def layer_cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The cases of the tables and plots; a CPU has shapes of its own. ``quick``: one shape."""
    if device.type != "cuda":
        return _cpu_cases(quick)
    table = [(*shape, RANK, mode, False, VARIANTS) for shape in SHAPES for mode in MODES]
    table += [(*shape, RANK, mode, True, VARIANTS) for shape in GRAPHED for mode in MODES]
    if quick:
        table = table[:2]
    else:
        # Without a graph at a size where the host decides; then the points of the plots.
        table += [(*GRAPHED[0], RANK, MODES[1], False, VARIANTS[:-1])]
        table += [(m, 4096, 4096, RANK, MODES[1], True, SWEPT) for m in TOKENS]
        table += [(*SHAPES[0], r, MODES[1], False, SWEPT) for r in RANKS]
    chosen = {row[:-1]: row for row in reversed(table)}  # once each, with the most variants
    return [
        layer_case(m, k, n, r, mode, torch.bfloat16, graph, variants)
        for m, k, n, r, mode, graph, variants in reversed(chosen.values())
    ]


def _cpu_cases(quick: bool) -> list[Case]:
    dtypes = (torch.bfloat16,) if quick else (torch.float32, torch.bfloat16)
    shapes = CPU_SHAPES[:1] if quick else CPU_SHAPES
    names = [name for name in VARIANTS if name != COMPILED]
    return [
        layer_case(*shape, mode, dtype, names=names)
        for shape in shapes
        for dtype in dtypes
        for mode in MODES
    ]


def layer_cases_of(
    device: torch.device,
    shapes: Iterable[tuple[int, int, int]] | None,
    ranks: Collection[int] | None,
    dtype: torch.dtype,
) -> list[Case]:
    """Both modes of each shape (tokens, in, out) and rank; None stands for one that is usual."""
    usual = SHAPES[0] if device.type == "cuda" else (1024, 768, 768)
    return [
        layer_case(*shape, r, mode, dtype)
        for shape in shapes or [usual]
        for r in ranks or [RANK]
        for mode in MODES
    ]


def layer_case(
    m: int,
    k: int,
    n: int,
    r: int,
    mode: str,
    dtype: torch.dtype,
    graph: bool = False,
    names: Iterable[str] = VARIANTS,
    stored: tuple[str, float] | None = None,
) -> Case:
    """M tokens, K in, N out, rank r, in those variants of ``names`` that this dtype has.

    ``stored``: for a quantised weight, what records call the operation, and the bits of an element.

    FLOPs: forward 2 M N K + 2 M r (K + N); backward 2 M N K + 4 M r (K + N).
    Bytes that must move: forward item (M K + N K + M N), backward item (2 M K + N K + M N), and
    item r (K + N) for the factors, three times with backward: they are read twice, and their
    gradients are written.
    """
    backward = mode == "forward+backward"
    flops = (2 * m * n * k) * (1 + backward) + (2 * m * r * (k + n)) * (1 + 2 * backward)
    op, bits = stored or ("lora_linear", 8 * dtype.itemsize)
    of_weight = n * k * bits / (8 * dtype.itemsize)
    items = (m * k + of_weight + m * n) + backward * (2 * m * k + of_weight + m * n)
    items += r * (k + n) * (1 + 2 * backward)
    fields = {
        "op": op, "mode": mode, "graph": graph,
        "shape": {"M": m, "K": k, "N": n, "r": r}, "rounding": None,
        "dtype": dtype_name(dtype), "bytes": int(items * dtype.itemsize), "flops": flops,
    }  # fmt: skip
    if dtype != torch.bfloat16:
        names = [name for name in names if name != "peft-bf16"]
    if dtype == torch.float32:  # "deltadiff" itself has float32 adapters then
        names = [name for name in names if name != "deltadiff-fp32"]
    if not has_peft():
        names = [name for name in names if not name.startswith("peft")]
    return Case(fields, "frozen", functools.partial(_build, m, k, n, r, backward, dtype, names))


def _build(m, k, n, r, backward, dtype, names, device) -> dict[str, Variant]:
    torch.manual_seed(0)
    x = torch.randn(m, k, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    lora_A = torch.randn(r, k, device=device) / k**0.5
    lora_B = torch.randn(n, r, device=device)  # not zero: a product with zeros is faster
    dy = torch.randn(m, n, dtype=dtype, device=device)

    def variant(name: str) -> Variant:
        adapter_dtype = dtype if name in UNMIXED else torch.float32

        def make() -> Callable:
            layer, inputs = LAYERS[name](weight, lora_A, lora_B, adapter_dtype)

            def forward():
                with torch.no_grad():
                    layer(x)

            def forward_backward():
                torch.autograd.grad(layer(x), [x, *inputs], dy)

            return forward_backward if backward else forward

        return Variant(make, {"adapter_dtype": dtype_name(adapter_dtype)})

    return {name: variant(name) for name in names}


# ------------------------------------------------------------------------- variants
# Each takes W (out, in), A (r, in), B (out, r) and the adapters' dtype. It returns the layer, which
# is callable, and the list of its A and B.


def dense(weight: Tensor) -> nn.Linear:
    """A frozen layer with this weight."""
    n, k = weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _frozen(weight, lora_A, lora_B, dtype):
    return dense(weight), []


def deltadiff_layer(weight, lora_A, lora_B, dtype, linear=dense, backend=None):
    """``linear`` makes the base layer of the weight."""
    model = nn.Sequential(linear(weight))
    r = lora_A.shape[0]
    swap_(
        model, r=r, lora_alpha=ALPHA, target_modules=lambda *_: True, adapter_dtype=dtype,
        backend=backend,
    )  # fmt: skip
    layer = model[0]
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    return layer, [layer.lora_A, layer.lora_B]


def _eager(weight, lora_A, lora_B, dtype):
    factors = [t.to(dtype).requires_grad_() for t in (lora_A, lora_B)]
    scaling = ALPHA / lora_A.shape[0]
    return lambda x: lora_linear_ref(x, weight, *factors, scaling=scaling), factors


def peft_layer(weight, lora_A, lora_B, dtype, swap=False, linear=dense):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora_A.shape[0], lora_alpha=ALPHA, target_modules=["0"])
    model = nn.Sequential(linear(weight))
    model.is_loaded_in_4bit = linear is not dense  # which PEFT asks
    model = inject_adapter_in_model(config, model)
    if swap:
        swap_(model)
    factors = set_peft_factors(model[0], lora_A, lora_B, dtype)
    return mixed(model[0], dtype, weight.dtype), factors


def set_peft_factors(
    layer: nn.Module, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype
) -> list[nn.Parameter]:
    """Copies of A and B in ``dtype``, put into a layer of PEFT."""
    factors = []
    for modules, values in ((layer.lora_A, lora_A), (layer.lora_B, lora_B)):
        modules["default"].weight = nn.Parameter(values.to(dtype, copy=True))
        factors.append(modules["default"].weight)
    return factors


def mixed(call: Callable, adapter_dtype: torch.dtype, dtype: torch.dtype) -> Callable:
    """``call`` under autocast where the adapters have another dtype, as trainers run it."""
    if adapter_dtype == dtype:
        return call

    def autocast(x):
        with torch.autocast(x.device.type, dtype=dtype):
            return call(x)

    return autocast


def _peft_compiled(weight, lora_A, lora_B, dtype):
    layer, factors = peft_layer(weight, lora_A, lora_B, dtype)
    torch.compiler.reset()  # after another shape, sizes would be compiled as dynamic ones
    return torch.compile(layer, dynamic=False), factors


LAYERS = {
    "frozen": _frozen,
    "deltadiff": deltadiff_layer,
    "deltadiff-fp32": deltadiff_layer,
    "eager": _eager,
    "peft-swapped": functools.partial(peft_layer, swap=True),
    "peft": peft_layer,
    "peft-bf16": peft_layer,
    COMPILED: _peft_compiled,
}
