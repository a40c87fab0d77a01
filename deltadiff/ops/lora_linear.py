"""`lora_linear`: a linear layer with a low-rank branch, and its gradients, in one operation."""

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
from ..errors import ArgumentTypeError
from . import reference
from .backends import check_backend
from .decode_fp8 import Float8
from .dispatch import choose_path
from .lora_linear_passes import LoraLinearFunction, reached_from_cpp
from .lora_linear_quantised import lora_linear_quantised
from .quantised import Quantised, check_quantised, decoded, is_quantised
from .remade import remade_of
from .transforms import transformed


def check_lora_linear(
    x: Tensor,
    weight: Tensor | Quantised,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    gate: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise where the arguments of `lora_linear` do not fit each other."""
    check_plain("x", x)
    _check_weight(weight)
    check_matrix("lora_A", lora_A)
    check_number("scaling", scaling)
    (n, k), r = weight.shape, lora_A.shape[0]
    adapter_dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    if is_quantised(weight):
        check_tensor("x", x, (*x.shape[:-1], k), weight.device, DTYPES)
    else:
        check_tensor("x", x, (*x.shape[:-1], k), x.device, (weight.dtype,))
        check_tensor("weight", weight, (n, k), x.device, DTYPES)
    check_tensor("lora_A", lora_A, (r, k), x.device, adapter_dtypes)
    check_tensor("lora_B", lora_B, (n, r), x.device, (lora_A.dtype,))
    if bias is not None:
        check_tensor("bias", bias, (n,), x.device, (x.dtype,))
    if gate is not None:
        scalar = isinstance(gate, Tensor) and gate.numel() == 1
        check_tensor("gate", gate, tuple(gate.shape) if scalar else (r,), x.device, DTYPES)


def _check_weight(weight: Tensor | Quantised) -> None:
    if is_quantised(weight):
        check_quantised("weight", weight)
    else:
        check_matrix("weight", weight)


# -------------------------------------------------------------------------------- lora_linear


def _layer(
    weight: Tensor | Quantised, lora_A: Tensor
) -> tuple[tuple[int, int, int], bool, tuple[int, int] | None]:
    """(out_features, in_features, r), whether W is stored (in, out), and its block in FP8."""
    try:
        (n, k), r = weight.shape, lora_A.shape[0]
        transposed = not is_quantised(weight) and weight.stride(1) != 1
    except (AttributeError, ValueError, IndexError, RuntimeError):
        _check_weight(weight)  # these two name what does not fit
        check_matrix("lora_A", lora_A)
        raise
    if torch.compiler.is_compiling():  # makes constants of them where it treats sizes as variables
        n, k, r = (range(size).stop for size in (n, k, r))
    return (n, k, r), transposed, weight.e4m3_block if isinstance(weight, Float8) else None


def path_of(
    x: Tensor, weight: Tensor | Quantised, lora_A: Tensor, backend: str | None, dropout: bool
) -> tuple[str, bool]:
    """The backend that runs a call, and whether torch.ops.deltadiff reaches it."""
    if backend is not None:
        check_backend(backend)
    layer, transposed, block = _layer(weight, lora_A)
    return _lora_linear_path(x.device, x.dtype, backend, layer, dropout, transposed, block)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts x and W to; None where it leaves them as they are."""
    try:
        if not torch.is_autocast_enabled(x.device.type):
            return None
    except RuntimeError:  # on meta, for instance
        accepted = "a device that computes, such as cpu or cuda"
        raise ArgumentTypeError("x", f"device {x.device}", accepted) from None
    cast = x.dtype in (torch.float32, *HALF_DTYPES)
    return torch.get_autocast_dtype(x.device.type) if cast else None


@torch.compiler.assume_constant_result
def _lora_linear_path(
    device: torch.device,
    dtype: torch.dtype,
    asked: str | None,
    layer: tuple[int, int, int],
    dropout: bool,
    transposed: bool,
    fp8_block: tuple[int, int] | None,
) -> tuple[str, bool]:
    """The backend, and whether torch.ops.deltadiff.lora_linear reaches it."""
    how = dropout, transposed, transformed(), fp8_block
    backend = choose_path(device, dtype, asked, layer, *how).backend
    return backend, reached_from_cpp(backend, device)


def lora_linear(
    x: Tensor,
    weight: Tensor | Quantised,
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
        weight: (N, K), the dtype of x (under autocast both are cast to the autocast dtype). Or a
            `FourBit` or `Float8` of this shape, which is decoded in the dtype of x in each pass;
            nothing of the size of W is kept for the backward pass, except by the reference.
            Backends "fp8" and "scaled_mm" multiply by a `Float8` itself, with x and dy in FP8
            (`reference_fp8.lora_linear_fp8_ref`).
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
    compute = autocast_dtype(x)
    if compute is not None:
        if bias is not None:
            check_plain("bias", bias)
        x = x.to(compute)
        if not is_quantised(weight):
            check_matrix("weight", weight)
            weight = weight.detach().to(compute)
        bias = None if bias is None else bias.to(compute)
    if type(scaling) is not float:
        scaling = check_number("scaling", scaling)
    p = dropout
    if type(p) is not float or p != 0:
        p = reference.round_dropout(check_dropout("dropout", p))
    mask_seed = check_seed(seed, x.device) if p else None
    args = x, weight, lora_A, lora_B, scaling, gate, bias
    backend, native = path_of(x, weight, lora_A, backend, mask_seed is not None)
    kernel_args = *args[:4], scaling / (1 - p), gate, bias, p, mask_seed, backend
    remade = None
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        remade = remade_of(x)
    if native and remade is None and not is_quantised(weight):
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
        matrix = decoded(weight, x.dtype, backend)
        return reference.lora_linear_ref(
            x, matrix, lora_A, lora_B, scaling=scaling, gate=gate, bias=bias, dropout=p,
            seed=0 if mask_seed is None else mask_seed,
        )  # fmt: skip
    weight = weight if is_quantised(weight) else weight.detach()
    if torch.compiler.is_compiling() and is_quantised(weight):
        return lora_linear_quantised(x, weight, *kernel_args[2:])
    return LoraLinearFunction.apply(x, weight, *kernel_args[2:], remade)
