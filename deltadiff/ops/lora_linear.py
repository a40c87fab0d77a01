"""`lora_linear`: a linear layer with a low-rank branch, and its gradients, in one operation."""

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    DTYPES,
    HALF_DTYPES,
    check_dropout,
    check_matrix,
    check_number,
    check_plain,
    check_seed,
    check_tensor,
)
from ..errors import ArgumentTypeError, BackendUnavailableError
from . import reference
from .dispatch import (
    CPP_MISSING,
    LAUNCHERS,
    Kernel,
    check_backend,
    choose_path,
    keeps_x,
    kernel_at,
    runs_of,
)
from .transforms import transformed

with contextlib.suppress(ImportError, AttributeError):  # without Gluon, dispatch names no "hopper"
    from ..kernels.lora_linear import hopper_launch, hopper_plan
    from ..kernels.runtime.plan import CannotPlanError


def check_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gate: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise where the arguments of `lora_linear` do not fit each other."""
    check_plain("x", x)
    check_matrix("weight", weight)
    check_matrix("lora_A", lora_A)
    check_number("scaling", scaling)
    (n, k), r = weight.shape, lora_A.shape[0]
    adapter_dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    check_tensor("x", x, (*x.shape[:-1], k), x.device, (weight.dtype,))
    check_tensor("weight", weight, (n, k), x.device, DTYPES)
    check_tensor("lora_A", lora_A, (r, k), x.device, adapter_dtypes)
    check_tensor("lora_B", lora_B, (n, r), x.device, (lora_A.dtype,))
    if bias is not None:
        check_tensor("bias", bias, (n,), x.device, (x.dtype,))
    if gate is not None:
        scalar = isinstance(gate, Tensor) and gate.numel() == 1
        check_tensor("gate", gate, tuple(gate.shape) if scalar else (r,), x.device, DTYPES)


# ------------------------------------------------------------ the two passes, launched from Python


def _kernel_of(tokens: int, weight: Tensor, r: int, dropout: bool, backend: str) -> Kernel:
    """The kernel that runs a call for which ``backend`` was chosen."""
    return kernel_at(runs_of(backend, (*weight.shape, r, weight.dtype, dropout)), tokens)


def _launch_fwd(
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
    kernel = _kernel_of(m, weight, r, seed is not None, backend)
    kept = None
    if kernel.backend != backend:  # it keeps less, but the backend's calls all keep one shape
        kept = x.new_empty(_kept_shape(backend, m, r, gate is not None), dtype=torch.float32)
    mask = {} if seed is None else {"dropout": dropout, "seed": seed}  # some kernels have none
    launch = LAUNCHERS[kernel.name].lora_linear_fwd
    return launch(x, weight, lora_A, lora_B, scaling, gate, bias, kept, **mask)


def _launch_bwd(
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
    kernel = _kernel_of(dy.shape[0], weight, lora_A.shape[0], seed is not None, backend)
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


def _kept_shape(backend: str, m: int, r: int, gated: bool) -> tuple[int, int]:
    """Shape of what the forward pass keeps.

    It depends on the backend but not on the kernel, so that torch.compile has one shape for every
    number of tokens.
    """
    return hopper_launch.kept_shape(m, r, gated) if backend == "hopper" else (m, r)


class LoraLinearFunction(torch.autograd.Function):
    """`csrc/lora_linear_autograd.cpp` in Python: where that is not built, or Triton interprets."""

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        rows = x.reshape(-1, weight.shape[1])
        y, s = _launch_fwd(
            rows, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend
        )  # fmt: skip
        need_gate = gate is not None and gate.requires_grad
        kept_x = x if keeps_x(backend, lora_A.requires_grad, need_gate) else None
        ctx.save_for_backward(kept_x, weight, lora_A, lora_B, gate, s, seed)
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, gate, s, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, _, need_gate, need_bias = ctx.needs_input_grad[:7]
        needs = [need_x, need_A, need_B, need_gate]
        n, k = weight.shape
        leading, dy = dy.shape[:-1], dy.reshape(-1, n)
        rows = None if x is None else x.reshape(-1, k)
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)  # from is_grads_batched=True
        if torch.is_grad_enabled() or batched:
            dx, da, db, dgate = _reference_bwd(
                dy, rows, weight, lora_A, lora_B, ctx.scaling, gate, needs, ctx.dropout, seed
            )
        else:
            dx, da, db, dgate = _launch_bwd(
                dy, rows, weight, lora_A, lora_B, s, ctx.scaling, gate, needs,
                ctx.dropout, seed, ctx.backend,
            )  # fmt: skip
        dx = None if dx is None else dx.view(*leading, k)
        dbias = dy.sum(0, dtype=torch.float32).to(weight.dtype) if need_bias else None
        return dx, None, da, db, None, dgate, dbias, None, None, None


if not CPP_MISSING:
    torch.library.impl("deltadiff::lora_linear_fwd_python", "default")(_launch_fwd)
    torch.library.impl("deltadiff::lora_linear_bwd_python", "default")(_launch_bwd)
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
        shape = _kept_shape(backend, x.shape[0], lora_A.shape[0], gate is not None)
        dtype = x.dtype if backend == "cpp" else torch.float32
        return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty(shape, dtype=dtype)

    @torch.library.impl("deltadiff::lora_linear_plan", "default")
    def _plan(
        x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *rest: Tensor | bool | None
    ) -> list[int]:
        """The launches of a pass for C++, empty where Python must launch.

        C++ asks once for each kind of call for which backend "hopper" was chosen.
        """
        if _kernel_of(x.shape[0], weight, lora_A.shape[0], False, "hopper").name != "hopper":
            return []
        try:
            return hopper_plan.lora_linear_plan(x, weight, lora_A, lora_B, *rest)
        except (CannotPlanError, AttributeError, KeyError) as error:  # of another Triton
            warnings.warn(f"deltadiff launches from Python, slower: {error!r}", stacklevel=2)
            return []


# -------------------------------------------------------------------------------- lora_linear


def _layer(weight: Tensor, lora_A: Tensor) -> tuple[tuple[int, int, int], bool]:
    """(out_features, in_features, r), and whether W is stored (in, out), for `choose_path`."""
    try:
        (n, k), r, transposed = weight.shape, lora_A.shape[0], weight.stride(1) != 1
    except (AttributeError, ValueError, IndexError, RuntimeError):
        check_matrix("weight", weight)  # these two name what does not fit
        check_matrix("lora_A", lora_A)
        raise
    if torch.compiler.is_compiling():  # makes constants of them where it treats sizes as variables
        n, k, r = (range(size).stop for size in (n, k, r))
    return (n, k, r), transposed


@torch.compiler.assume_constant_result
def _lora_linear_path(
    device: torch.device,
    dtype: torch.dtype,
    asked: str | None,
    layer: tuple[int, int, int],
    *how: bool,
) -> tuple[str, bool]:
    """The backend, and whether torch.ops.deltadiff.lora_linear reaches it."""
    backend = choose_path(device, dtype, asked, layer, *how, transformed()).backend
    reached = backend == "cpp" or (backend != "reference" and device.type == "cuda")
    return backend, reached and not CPP_MISSING


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a low-rank branch: y = x W^T + bias + s g (x A^T) B^T (DiffoRA eq. 10).

    With ``dropout`` p, the branch sees m x / (1 - p) instead of x. The keep mask m is a function of
    ``seed`` and of the place in x alone. It is the same on every backend, and the backward pass
    makes it again instead of storing it.

    The result is differentiable in ``x``, ``lora_A``, ``lora_B``, ``gate`` and ``bias``. ``weight``
    is a constant: no gradient is computed for it, even if it requires one. x is kept for the
    backward pass only where that reads it (`dispatch.keeps_x`): where ``lora_A`` requires a
    gradient and, in the C++ kernels on the CPU, where ``gate`` does.

    Second derivatives, as from ``create_graph=True``, and everything under a transform of
    torch.func or forward-mode differentiation come from the reference.

    Args:
        x: (..., K), any leading shape and strides, also empty; float32, bfloat16, float16 or
            float64.
        weight: (N, K), the dtype of x (under autocast both are cast to the autocast dtype).
        lora_A: (r, K), the dtype of x or float32 (the usual mixed case; its gradient is then
            float32).
        lora_B: (N, r), the dtype of lora_A.
        scaling: s, ``lora_alpha / r`` (rsLoRA: ``lora_alpha / sqrt(r)``).
        gate: g, a tensor on the device with one entry or r entries; None is 1.
        bias: (N,), the dtype of x.
        dropout: p, 0 <= p < 1, rounded to 1/65536. The sm_90 kernel has no dropout.
        seed: an int or a 0-dim int64 tensor on the device of x, which determines the mask. From a
            tensor, a CUDA graph or a compiled function reads a new seed each time.
        backend: None chooses one (see `choose_path`); a name asks for that one.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device or shape does not fit.
        BackendUnavailableError: ``backend`` cannot run here, or not under such a transform; (in a
            backward pass with ``create_graph=True``) second derivatives where x was not kept.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", type(x).__name__, "a torch.Tensor")
    try:
        autocast = torch.is_autocast_enabled(x.device.type)
    except RuntimeError:  # on meta, for instance
        accepted = "a device that computes, such as cpu or cuda"
        raise ArgumentTypeError("x", f"device {x.device}", accepted) from None
    if autocast and x.dtype in (torch.float32, *HALF_DTYPES):
        check_matrix("weight", weight)
        if bias is not None:
            check_plain("bias", bias)
        compute = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(compute), weight.detach().to(compute)
        bias = None if bias is None else bias.to(compute)
    if type(scaling) is not float:
        scaling = check_number("scaling", scaling)
    p = dropout
    if type(p) is not float or p != 0:
        p = reference.round_dropout(check_dropout("dropout", p))
    mask_seed = check_seed(seed, x.device) if p else None
    args = x, weight, lora_A, lora_B, scaling, gate, bias
    if backend is not None:
        check_backend(backend)
    layer, transposed = _layer(weight, lora_A)
    how = mask_seed is not None, transposed
    backend, native = _lora_linear_path(x.device, x.dtype, backend, layer, *how)
    kernel_args = *args[:4], scaling / (1 - p), gate, bias, p, mask_seed, backend
    if native:
        try:
            return torch.ops.deltadiff.lora_linear(*kernel_args)
        except Exception as raised:  # C++ says only that something does not fit
            error = raised
        try:
            check_lora_linear(*args)
            raise error
        finally:  # the error holds this frame and so x; activation checkpointing ends in an error
            del error
    check_lora_linear(*args)
    if backend == "reference":
        return reference.lora_linear_ref(
            *args[:4], scaling=scaling, gate=gate, bias=bias, dropout=p,
            seed=0 if mask_seed is None else mask_seed,
        )  # fmt: skip
    return LoraLinearFunction.apply(x, weight.detach(), *kernel_args[2:])
