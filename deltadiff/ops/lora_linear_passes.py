"""The two passes of `lora_linear`, launched from Python, and their autograd.

`csrc/lora_linear_autograd.cpp` is `LoraLinearFunction` in C++, for matrices of ordinary numbers. A
weight of few bits (`Quantised`) is decoded in each pass and forgotten after it, or for the backward
pass of products in FP8 transposed: nothing of the size of W is kept. The memory comes from
PyTorch's allocator, which gives the layers that run one after another on a stream the same block
again: one workspace for each stream, and in each CUDA graph, that nobody has to look after.
"""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from . import reference
from .backends import CPP_MISSING, LAUNCHERS
from .decode_fp8 import Float8
from .dispatch import FP8_PRODUCTS, Kernel, keeps_x, kernel_at, runs_of
from .quantised import Quantised, decoded, is_quantised, operation
from .reference_fp8 import activation_columns
from .remade import Remade, made_of, sources_of
from .transforms import wants_reference

with contextlib.suppress(ImportError, AttributeError):  # without Gluon, dispatch names no "hopper"
    from ..kernels.lora_linear import hopper_launch, hopper_plan
    from ..kernels.runtime.plan import CannotPlanError


def reached_from_cpp(backend: str, device: torch.device) -> bool:
    """Whether torch.ops.deltadiff's operations of `lora_linear` reach the kernels of a backend."""
    reached = backend == "cpp" or (backend != "reference" and device.type == "cuda")
    return reached and not CPP_MISSING


def kernel_of(
    tokens: int, weight: Tensor | Quantised, r: int, dtype: torch.dtype, dropout: bool, backend: str
) -> Kernel:
    """The kernel that runs a call for which ``backend`` was chosen; ``dtype`` is that of x."""
    layer: tuple = (*weight.shape, r, dtype, dropout)
    if isinstance(weight, Float8):
        layer += False, weight.e4m3_block
    return kernel_at(runs_of(backend, layer), tokens)


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gate: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(y, kept) of the kernel that runs this call; x (M, K)."""
    m, r = x.shape[0], lora_A.shape[0]
    kernel = kernel_of(m, weight, r, x.dtype, seed is not None, backend)
    kept = None
    if kernel.backend != backend:  # it keeps less, but the backend's calls all keep one shape
        kept = x.new_empty(kept_shape(backend, m, r, gate is not None), dtype=torch.float32)
    mask = {} if seed is None else {"dropout": dropout, "seed": seed}  # some kernels have none
    launch = LAUNCHERS[kernel.name].lora_linear_fwd
    return launch(x, weight, lora_A, lora_B, scaling, gate, bias, kept, **mask)


def launch_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    kept: Tensor,
    scaling: float,
    gate: Tensor | None,
    needs: Sequence[bool],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> Sequence[Tensor | None]:
    """(dx, dA, dB, dgate) of the kernel that ran the forward pass; dy (M, N)."""
    m, r = dy.shape[0], lora_A.shape[0]
    kernel = kernel_of(m, weight, r, dy.dtype, seed is not None, backend)
    mask = {} if seed is None else {"dropout": dropout, "seed": seed}
    launch = LAUNCHERS[kernel.name].lora_linear_bwd
    return launch(dy, x, weight, lora_A, lora_B, kept, scaling, gate, needs, **mask)


def _reference_bwd(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gate: Tensor | None,
    needs: Sequence[bool],
    dropout: float,
    seed: Tensor | None,
) -> Sequence[Tensor | None]:
    """(dx, dA, dB, dgate) by PyTorch's own operations, for derivatives of these in turn.

    The forward pass cannot know that they will be wanted, so a backend's kernels may have run it.
    """
    need_x, _, need_B, need_gate = needs
    if not any(needs):
        return [None] * 4
    if x is None:
        if need_B or need_gate:
            raise BackendUnavailableError(
                "backend",
                "a second derivative where lora_A is frozen, for which x was not kept",
                "backend='reference', which keeps all that these need",
            )
        x = dy.new_zeros(dy.shape[0], weight.shape[1]).requires_grad_(need_x)  # dx is without x
    create_graph, device = torch.is_grad_enabled(), dy.device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # Aliases, so that no gradient goes on from one of them to another that it was made of.
        leaves = [None if t is None else t.view_as(t) for t in (x, lora_A, lora_B, gate)]
        x, a, b, gate = leaves
        assert x is not None and a is not None and b is not None
        y = reference.lora_linear_ref(
            x, weight, a, b, scaling=scaling * (1 - dropout), gate=gate,
            dropout=dropout, seed=0 if seed is None else seed,
        )  # fmt: skip
        wanted = [t for t, need in zip(leaves, needs, strict=True) if need and t is not None]
        grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph))
    return [next(grads) if need else None for need in needs]


def kept_shape(backend: str, m: int, r: int, gated: bool) -> tuple[int, int]:
    """Shape of what the forward pass keeps.

    It depends on the backend but not on the kernel, so that torch.compile has one shape for every
    number of tokens.
    """
    return hopper_launch.kept_shape(m, r, gated) if backend == "hopper" else (m, r)


def run_fwd(x: Tensor, weight: Tensor | Quantised, *rest: Any) -> tuple[Tensor, Tensor]:
    """(y, kept) of a forward pass; the arguments are those of `launch_fwd`, the backend last."""
    if is_quantised(weight):
        return operation(weight, "_fwd")(x, *weight.parts, *rest)
    in_cpp = reached_from_cpp(rest[-1], x.device)
    run: Any = torch.ops.deltadiff.lora_linear_fwd if in_cpp else launch_fwd
    return run(x, weight, *rest)


def run_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | Quantised, *rest: Any
) -> Sequence[Tensor | None]:
    """(dx, dA, dB, dgate) of a backward pass; the arguments are those of `launch_bwd`."""
    if is_quantised(weight):
        return operation(weight, "_bwd")(dy, x, *weight.parts, *rest)
    in_cpp = reached_from_cpp(rest[-1], dy.device)
    run: Any = torch.ops.deltadiff.lora_linear_bwd if in_cpp else launch_bwd
    return run(dy, x, weight, *rest)


def fwd_over(
    x: Tensor,
    weight: Quantised,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gate: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`run_fwd` over a weight of few bits, behind the boundary of an operation of PyTorch."""
    product = lora_A, lora_B, scaling, gate, bias
    if takes_fp8(weight, x.shape[0], lora_A.shape[0], x.dtype, seed is not None, backend):
        columns = columns_of_scale(weight, backend)
        return LAUNCHERS[backend].lora_linear_fwd(x, weight, columns, *product)
    return run_fwd(x, decoded(weight, x.dtype, backend), *product, dropout, seed, backend)


def takes_fp8(
    weight: object, tokens: int, r: int, dtype: torch.dtype, dropout: bool, backend: str
) -> TypeGuard[Float8]:
    """Whether the kernel that runs such a call multiplies by a weight in FP8 itself."""
    if not isinstance(weight, Float8):
        return False
    return kernel_of(tokens, weight, r, dtype, dropout, backend).name in FP8_PRODUCTS


def columns_of_scale(weight: Float8, backend: str) -> int:
    """How many columns of activations share a scale in the products of ``backend``."""
    return activation_columns(weight.block) if backend == "fp8" else max(weight.shape)


def bwd_over(
    dy: Tensor,
    x: Tensor | None,
    weight: Quantised,
    lora_A: Tensor,
    lora_B: Tensor,
    kept: Tensor,
    scaling: float,
    gate: Tensor | None,
    needs: Sequence[bool],
    dropout: float,
    seed: Tensor | None,
    backend: str,
) -> Sequence[Tensor | None]:
    """`run_bwd` over a weight of few bits, see `fwd_over`."""
    product = lora_A, lora_B, kept, scaling, gate, needs
    if takes_fp8(weight, dy.shape[0], lora_A.shape[0], dy.dtype, seed is not None, backend):
        columns = columns_of_scale(weight, backend)
        return LAUNCHERS[backend].lora_linear_bwd(dy, x, weight, columns, *product)
    return run_bwd(dy, x, decoded(weight, dy.dtype, backend), *product, dropout, seed, backend)


def bwd_before_da(
    dy: Tensor,
    weight: Tensor | Quantised,
    lora_A: Tensor,
    lora_B: Tensor,
    kept: Tensor,
    scaling: float,
    gate: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> Sequence[Tensor | None]:
    """(dx, V, dB, dgate) of a backward pass: V (M, r or more) = s g dY B, and dA = V^T x of any x.

    All are None, and nothing was computed, where no kernel runs the call that can do so.
    """
    m, r = dy.shape[0], lora_A.shape[0]
    rest = lora_A, lora_B, kept, scaling, gate, (needs[0], False, *needs[2:])
    if takes_fp8(weight, m, r, dy.dtype, False, backend):
        columns = columns_of_scale(weight, backend)
        return LAUNCHERS[backend].bwd_before_da(dy, weight, columns, *rest)
    if kernel_of(m, weight, r, dy.dtype, False, backend).name != "hopper":
        return [None] * 4
    return hopper_launch.bwd_before_da(dy, decoded(weight, dy.dtype, backend), *rest)


class LoraLinearFunction(torch.autograd.Function):
    """What `csrc/lora_linear_autograd.cpp` does.

    It is used where that is not built, where Triton interprets, for a weight of few bits, and for
    an x that the backward pass makes again (see `remade.py`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Quantised,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        gate: Tensor | None,
        bias: Tensor | None,
        dropout: float,
        seed: Tensor | None,
        backend: str,
        remade: Remade | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, lora_A.shape[1])
        y, s = run_fwd(rows, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend)
        need_gate = gate is not None and gate.requires_grad
        reads_x = keeps_x(backend, lora_A.requires_grad, need_gate)
        sources, ctx.again = sources_of(x, remade, reads_x)
        dense, ctx.packed = dense_or_packed(weight)
        ctx.save_for_backward(dense, lora_A, lora_B, gate, s, seed, *sources)
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        return y.view(*x.shape[:-1], lora_B.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dense, lora_A, lora_B, gate, s, seed, *sources = ctx.saved_tensors
        weight = dense if ctx.packed is None else ctx.packed
        with torch.set_grad_enabled(wants_reference(dy)):
            x = made_of(sources, ctx.again)
        need_x, _, need_A, need_B, _, need_gate, need_bias = ctx.needs_input_grad[:7]
        needs = [need_x, need_A, need_B, need_gate]
        n, k = lora_B.shape[0], lora_A.shape[1]
        leading, dy = dy.shape[:-1], dy.reshape(-1, n)
        rows = None if x is None else x.reshape(-1, k)
        last = ctx.scaling, gate, needs, ctx.dropout, seed
        if wants_reference(dy):
            matrix = decoded(weight, dy.dtype, ctx.backend)
            grads = _reference_bwd(dy, rows, matrix, lora_A, lora_B, *last)
        else:
            grads = run_bwd(dy, rows, weight, lora_A, lora_B, s, *last, ctx.backend)
        dx, da, db, dgate = (g if need else None for g, need in zip(grads, needs, strict=True))
        dx = None if dx is None else dx.view(*leading, k)
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if need_bias else None
        return dx, None, da, db, None, dgate, dbias, *[None] * 4


def dense_or_packed(weight: Tensor | Quantised) -> tuple[Tensor | None, Quantised | None]:
    """The weight as a tensor for autograd to keep, or as bytes that a context keeps itself.

    Hooks may move saved tensors elsewhere until they are needed. The bytes of a weight stay where
    they are in any case, so they are not saved.
    """
    return (None, weight) if is_quantised(weight) else (weight, None)


if not CPP_MISSING:
    torch.library.impl("deltadiff::lora_linear_fwd_python", "default")(launch_fwd)
    torch.library.impl("deltadiff::lora_linear_bwd_python", "default")(launch_bwd)
    _derivable = torch.library.Library("deltadiff", "IMPL")  # lives as long as this module
    _derivable.impl("lora_linear_bwd_reference", _reference_bwd, "CompositeImplicitAutograd")

    @torch.library.register_fake("deltadiff::lora_linear_fwd")
    def _fwd_shapes(
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        gate: Tensor | None,
        bias: Tensor | None,
        dropout: float,
        seed: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """The shapes of y and of what this backend keeps, for torch.compile."""
        shape = kept_shape(backend, x.shape[0], lora_A.shape[0], gate is not None)
        dtype = x.dtype if backend == "cpp" else torch.float32
        return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty(shape, dtype=dtype)

    @torch.library.impl("deltadiff::lora_linear_plan", "default")
    def _plan(
        x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Tensor | bool | None
    ) -> list[int]:
        """The launches of a pass for C++, empty where Python must launch.

        C++ asks once for each kind of call for which backend "hopper" was chosen.
        """
        m, r = x.shape[0], lora_A.shape[0]
        if kernel_of(m, weight, r, x.dtype, False, "hopper").name != "hopper":
            return []
        try:
            return hopper_plan.lora_linear_plan(x, weight, lora_A, lora_B, *rest)
        except (CannotPlanError, AttributeError, KeyError) as error:  # of another Triton
            warnings.warn(f"deltadiff launches from Python, slower: {error!r}", stacklevel=2)
            return []
