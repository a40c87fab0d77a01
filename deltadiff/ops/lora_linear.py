"""The public operations; with `step_ops` the only file that calls backends. `paths` picks one."""

import contextlib
import functools
import warnings

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import (
    DTYPES,
    HALF_DTYPES,
    check_dropout,
    check_matrix,
    check_number,
    check_seed,
    check_tensor,
)
from ..errors import ArgumentTypeError
from . import reference
from .dispatch import CPP_MISSING, KERNELS, choose_path


def check_lora_linear(x, weight, lora_A, lora_B, scaling, gate, bias) -> None:
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


with contextlib.suppress(ImportError, AttributeError):  # or Gluon, which is experimental
    from ..kernels.lora_linear import hopper_launch as lora_linear_hopper
    from ..kernels.lora_linear import hopper_plan as lora_linear_plan
    from ..kernels.runtime.plan import CannotPlanError


# -------------------------------------------------------------------- lora_linear


class LoraLinearFunction(torch.autograd.Function):
    """`csrc/lora_linear_autograd.cpp` in Python: where that is not built, or Triton interprets."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend):
        rows = x.reshape(-1, weight.shape[1])
        y, s = _launch(
            "lora_linear_fwd", rows, weight, lora_A, lora_B, scaling, gate, bias,
            dropout, seed, backend,
        )  # fmt: skip
        kept = x if lora_A.requires_grad else None  # for dA alone
        ctx.save_for_backward(kept, weight, lora_A, lora_B, gate, s, seed)
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, gate, s, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, _, need_gate, need_bias = ctx.needs_input_grad[:7]
        needs = [need_x, need_A, need_B, need_gate]
        n, k = weight.shape
        leading, dy = dy.shape[:-1], dy.reshape(-1, n)
        rows = None if x is None else x.reshape(-1, k)
        dx, da, db, dgate = _launch(
            "lora_linear_bwd", dy, rows, weight, lora_A, lora_B, s, ctx.scaling, gate, needs,
            ctx.dropout, seed, ctx.backend,
        )  # fmt: skip
        dx = dx.view(*leading, k) if need_x else None
        dbias = dy.sum(0, dtype=torch.float32).to(weight.dtype) if need_bias else None
        return dx, None, da, db, None, dgate, dbias, None, None, None


def _launch(name, *args):
    *args, dropout, seed, backend = args
    mask = {} if seed is None else {"dropout": dropout, "seed": seed}  # not every backend has one
    return getattr(KERNELS[backend], name)(*args, **mask)


if not CPP_MISSING:

    @torch.library.register_fake("deltadiff::lora_linear_fwd")
    def _lora_linear_fwd_shapes(
        x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend
    ):  # fmt: skip
        """What torch.compile has to know: y, and the S that this backend keeps."""
        m, r = x.shape[0], lora_A.shape[0]
        gated, hopper = gate is not None, backend == "hopper"
        shape = lora_linear_hopper.kept_shape(m, r, gated) if hopper else (m, r)
        dtype = x.dtype if backend == "cpp" else torch.float32
        return x.new_empty((m, weight.shape[0])), x.new_empty(shape, dtype=dtype)

    for _name in ("lora_linear_fwd", "lora_linear_bwd"):
        torch.library.impl(f"deltadiff::{_name}_python", "default")(
            functools.partial(_launch, _name)
        )

    @torch.library.impl("deltadiff::lora_linear_plan", "default")
    def _plan(*args):
        """Once for each kind of call on sm_90."""
        try:
            return lora_linear_plan.lora_linear_plan(*args)
        except (CannotPlanError, AttributeError, KeyError) as error:  # of another Triton
            warnings.warn(f"deltadiff launches from Python, slower: {error!r}", stacklevel=2)
            return []


def _layer(weight: Tensor, lora_A: Tensor) -> tuple[int, int, int]:
    """(out_features, in_features, r), for `choose_path`."""
    try:
        (n, k), r = weight.shape, lora_A.shape[0]
    except (AttributeError, ValueError, IndexError):  # it raises, and says what does not fit
        check_matrix("weight", weight)
        check_matrix("lora_A", lora_A)
        raise
    if torch.compiler.is_compiling():  # constants, also where it takes sizes for variables
        n, k, r = (range(size).stop for size in (n, k, r))
    return n, k, r


@torch.compiler.assume_constant_result
def _lora_linear_path(
    device: torch.device, dtype: torch.dtype, asked: str | None, layer: tuple, *how: bool
):  # fmt: skip
    """The backend, and whether torch.ops.deltadiff.lora_linear reaches it."""
    backend = choose_path(device, dtype, asked, layer, *how).backend
    reached = backend == "cpp" or (device.type == "cuda" and backend in KERNELS)
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

    With ``dropout`` p, the branch sees m x / (1 - p) in the place of x. The keep mask m is a
    function of ``seed`` and of the place in x alone: the same on every backend, and made again in
    the backward pass instead of being stored.

    Differentiable in ``x``, ``lora_A``, ``lora_B``, ``gate`` and ``bias``. ``weight`` is a
    constant: its gradient is never computed, also where it requires one. For the backward pass x is
    kept only where ``lora_A`` requires a gradient (in C++ on the CPU, also where ``gate`` does).

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
        dropout: p, 0 <= p < 1, rounded to 1/65536. The sm_90 kernel has none.
        seed: of the mask, an int or a 0-dim int64 tensor on the device of x; one seed, one mask. A
            tensor lets a CUDA graph or a compiled function read a new one each time.
        backend: None chooses (see `choose_path`); a name asks for one.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device or shape that does not fit.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", type(x).__name__, "a torch.Tensor")
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float32, *HALF_DTYPES):
        check_matrix("weight", weight)
        compute = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(compute), weight.detach().to(compute)
        bias = None if bias is None else bias.to(compute)
    if type(scaling) is not float:
        scaling = check_number("scaling", scaling)
    p = dropout
    if type(p) is not float or p != 0:
        p = reference.round_dropout(check_dropout("dropout", p))
    seed = check_seed(seed, x.device) if p else None
    args = x, weight, lora_A, lora_B, scaling, gate, bias
    layer = _layer(weight, lora_A)
    how = seed is not None, weight.stride(1) != 1
    backend, native = _lora_linear_path(x.device, x.dtype, backend, layer, *how)
    kernel_args = *args[:4], scaling / (1 - p), gate, bias, p, seed, backend
    if native:
        try:
            return torch.ops.deltadiff.lora_linear(*kernel_args)
        except Exception as raised:  # C++ tells only that something does not fit
            error = raised
        try:
            check_lora_linear(*args)
            raise error
        finally:  # it holds this frame, and with it x: activation checkpointing ends in one
            del error
    check_lora_linear(*args)
    if backend == "reference":
        return reference.lora_linear_ref(
            *args[:4], scaling=scaling, gate=gate, bias=bias, dropout=p, seed=seed
        )
    return LoraLinearFunction.apply(x, weight.detach(), *kernel_args[2:])
