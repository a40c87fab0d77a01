"""Checks of arguments; the dtypes, from the kernels' one table, and the one list of roundings.

Callers check every argument before they change anything. Each error names the argument.
"""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .kernels.runtime.dtypes import DTYPES as KERNEL_DTYPES

# ---------------------------------------------------------------- dtypes and roundings

# The dtypes of weights and activations, in the order in which tables show them. For float64 there
# are no kernels.
DTYPES = (*KERNEL_DTYPES, torch.float64)
# The 16-bit dtypes, each with the dtype of the remainder that is kept beside such a weight.
REMAINDER_DTYPES = {
    dtype: facts.remainder for dtype, facts in KERNEL_DTYPES.items() if facts.remainder is not None
}
HALF_DTYPES = tuple(REMAINDER_DTYPES)
# The dtypes that models are trained in, by the names that command lines take. float64 is left out:
# it is for checking.
NAMED_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPES if d != torch.float64}
# What an update does with bits that a 16-bit weight cannot hold; the default comes last.
ROUNDINGS = ("nearest", "stochastic", "remainder")
NO_ROUNDING = "none"  # for a wider weight, which holds all bits


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch." before it."""
    return str(dtype).removeprefix("torch.")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------- arguments


def check_plain(name: str, t: object) -> None:
    """Raise where ``t`` is no tensor, or one whose elements do not lie in memory by strides."""
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(name, type(t).__name__, "a torch.Tensor")
    if hasattr(t, "device_mesh"):
        accepted = "a plain tensor (gather it first); no tensor parallelism of LoRA layers"
        raise ArgumentTypeError(name, "a DTensor", accepted)
    if t.is_nested or t.layout != torch.strided:
        given = "a nested tensor" if t.is_nested else f"layout {t.layout}"
        raise ArgumentTypeError(name, given, "a dense tensor")


def check_tensor(
    name: str, t: Tensor, shape: tuple, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    """Raise where ``t`` is not a plain tensor of this shape, device and one of these dtypes."""
    check_plain(name, t)
    if t.dtype not in dtypes:
        raise ArgumentTypeError(name, f"dtype {t.dtype}", " or ".join(map(str, dtypes)))
    if t.device != device:
        raise ArgumentTypeError(name, f"device {t.device}", str(device))
    if tuple(t.shape) != shape:
        raise ArgumentError(name, f"shape {tuple(t.shape)}", f"shape {shape}")


def check_flag(name: str, t: object, shape: tuple, device: torch.device) -> None:
    """Raise where ``t`` is not a tensor of this shape that is compared with zero."""
    check_plain(name, t)
    assert isinstance(t, Tensor)
    if t.is_quantized or t.is_complex():
        raise ArgumentTypeError(name, f"dtype {t.dtype}", "a bool, an integer or a float dtype")
    check_tensor(name, t, shape, device, (t.dtype,))


def check_list(name: str, values: object) -> list:
    """``values`` as a list; raises where it is no list or tuple."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise ArgumentTypeError(name, type(values).__name__, "a list of tensors")
    return list(values)


def check_number(name: str, value: object, least: float = -math.inf) -> float:
    """``value`` as a float; raises where it is not a finite number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", "a float")
    accepted = "a finite number" + (f" >= {least:g}" if least > -math.inf else "")
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(name, "an int that no float can hold", accepted) from None
    if not math.isfinite(number) or number < least:
        raise ArgumentError(name, repr(value), accepted)
    return number


def check_int(name: str, value: object, least: int, bits: int | None = None) -> int:
    """``value``; raises where it is not an int of at least ``least``, or takes more ``bits``."""
    accepted = f"an int >= {least}" if bits is None else f"an int >= {least} in {bits} bits"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(name, f"{value!r:.60} ({type(value).__name__})", accepted)
    if bits is not None and value.bit_length() >= bits and value != -(2 ** (bits - 1)):
        raise ArgumentError(name, f"an int of {value.bit_length()} bits", accepted)
    if value < least:
        raise ArgumentError(name, value, accepted)
    return value


def check_betas(betas: object) -> tuple[float, float]:
    """AdamW's betas as floats; raises where they are not two numbers in [0, 1)."""
    accepted = "two floats in [0, 1)"
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ArgumentTypeError("betas", f"a {type(betas).__name__}", accepted)
    for beta in betas:
        if not 0 <= check_number("betas", beta) < 1:
            raise ArgumentError("betas", repr(betas), accepted)
    return float(betas[0]), float(betas[1])


def check_matrix(name: str, t: Tensor) -> None:
    """Raise where ``t`` is not a matrix with entries, in one of `DTYPES`."""
    check_plain(name, t)
    if t.dtype not in DTYPES:
        raise ArgumentTypeError(name, f"dtype {t.dtype}", " or ".join(map(str, DTYPES)))
    if t.dim() != 2 or t.numel() == 0:
        raise ArgumentError(
            name,
            f"shape {tuple(t.shape)}",
            "two dimensions, not empty (a sharded weight must be gathered first)",
        )


def check_dropout(name: str, p: object) -> float:
    """``p`` as a float; raises where it is not a probability below 1."""
    accepted = "a probability >= 0 and < 1"
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise ArgumentTypeError(name, f"{p!r} ({type(p).__name__})", accepted)
    if not 0 <= p < 1:  # torch.compile can follow this
        raise ArgumentError(name, "an int other than 0" if isinstance(p, int) else p, accepted)
    return float(p)


def check_seed(seed: object, device: torch.device) -> Tensor:
    """``seed`` as a 0-dim int64 tensor on ``device``; raises where it is not a seed."""
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), device, (torch.int64,))
        return seed
    seed = check_int("seed", seed, -(2**63), bits=64)
    return torch.full((), seed, dtype=torch.int64, device=device)


# ------------------------------------------------------------------- optional packages


def need_package(name: str, extra: str | None, argument: str | None = None) -> ModuleType:
    """Import an optional package.

    Args:
        name: the package, which has the same name on the index and in Python.
        extra: the extra of deltadiff that installs it; None if no extra does.
        argument: the argument that asked for it, for the error; the package by default.

    Raises:
        ArgumentError: it is not installed, or does not load; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = f"pip install {name}" if extra is None else f"pip install -e '.[{extra}]'"
        accepted = f"an installed {name}: {command}"
        raise ArgumentError(argument or name, f"nothing ({error})", accepted) from error
