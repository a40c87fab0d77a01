"""Which backend runs an operation, and why: one function, `choose_path`.

An operation has up to four: ``hopper`` and ``triton`` (`deltadiff.kernels`; the first is for
`lora_linear` on sm_90), ``cpp`` (`csrc`) and ``reference``. All of them share one signature.
"""

import functools
import importlib
from dataclasses import dataclass

import torch

from ..checks import HALF_DTYPES
from ..errors import ArgumentError, BackendUnavailableError

BACKENDS = ("hopper", "triton", "cpp", "reference")


try:
    importlib.import_module("deltadiff._C")  # registers torch.ops.deltadiff
    CPP_MISSING = None
except ImportError as error:
    CPP_MISSING = f"the C++ extension is not built ({error}); install with a C++ compiler present"


try:
    import triton

    from ..kernels.lora_linear import portable as _portable

    _TRITON_MISSING = None
    KERNELS = {"triton": _portable}  # the launchers of lora_linear, by backend
except ImportError as error:
    _TRITON_MISSING = f"Triton cannot be imported ({error})"
    KERNELS = {}


try:
    from ..kernels.lora_linear import hopper_launch as lora_linear_hopper

    _GLUON_MISSING = None
    KERNELS["hopper"] = lora_linear_hopper
except (ImportError, AttributeError) as error:  # Gluon is experimental, its names change
    _GLUON_MISSING = f"this Triton's Gluon is not the one that the kernel is written in ({error})"


@dataclass(frozen=True)
class Dispatch:
    """Which backend runs, and why that one."""

    backend: str
    reason: str


def why_unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when ``backend`` can run ``dtype`` on ``device``, else the reason in words."""
    if backend not in BACKENDS:
        raise ArgumentError("backend", repr(backend), f"None or one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 goes to the reference"
    if backend == "hopper":
        return _why_no_hopper(device, dtype)
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels run on the CPU, not on {device.type}"
        return CPP_MISSING
    if _TRITON_MISSING:
        return _TRITON_MISSING
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            return "Triton runs CPU tensors only in its interpreter (TRITON_INTERPRET=1)"
        return None
    if device.type != "cuda" or torch.version.hip:
        return "the Triton kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the Triton kernels need sm_80 or newer; {device} is sm_{major}{minor}"
    return None


def _why_no_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "the sm_90 kernel is for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the sm_90 kernel needs sm_90; {device} is sm_{major}{minor}"
    if dtype not in HALF_DTYPES:
        return "the sm_90 kernel is for bfloat16 and float16"
    return _TRITON_MISSING or _GLUON_MISSING


@functools.lru_cache(maxsize=256)
def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    layer: tuple[int, int, int] | None = None,
    dropout: bool = False,
    transposed: bool = False,
) -> Dispatch:
    """The backend for tensors of ``dtype`` on ``device``; ``backend`` asks for one by name.

    Args:
        layer: (out_features, in_features, r) for `lora_linear`, which has a kernel of its own for
            most layers on sm_90; None for the other operations.
        dropout: whether the layer has some, which that kernel cannot do.
        transposed: whether W is stored (in, out), as GPT-2's, which that kernel would copy.

    Raises:
        BackendUnavailableError: ``backend`` was asked for and cannot run here.
    """
    no_hopper = _why_no_hopper(device, dtype)
    if no_hopper is None:
        no_hopper = lora_linear_hopper.why_not(*layer) if layer else "for lora_linear only"
        if layer and dropout:
            no_hopper = "the sm_90 kernel has no dropout"
    if backend is not None:
        reason = no_hopper if backend == "hopper" else why_unavailable(backend, device, dtype)
        if reason:
            raise BackendUnavailableError(
                "backend",
                f"{backend!r} for {dtype} on {device}: {reason}",
                "a backend that `deltadiff info` lists as there",
            )
        return Dispatch(backend, "asked for")
    native = "cpp" if device.type == "cpu" else "triton"
    reason = why_unavailable(native, device, dtype)
    if reason:
        return Dispatch("reference", reason)
    if native == "cpp":
        return Dispatch("cpp", "CPU: native C++")
    major, minor = torch.cuda.get_device_capability(device)
    if no_hopper is None and transposed:
        no_hopper = "W is stored (in, out), which the sm_90 kernel would copy"
    if no_hopper is None:
        return Dispatch("hopper", "sm_90: one launch forward, one backward")
    why = f" ({no_hopper})" if layer and (major, minor) == (9, 0) else ""
    return Dispatch("triton", f"sm_{major}{minor}: portable Triton kernels{why}")
