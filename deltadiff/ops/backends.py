"""The backends: the ways of running an operation, and whether one is there.

``triton`` (`deltadiff.kernels`), ``cpp`` (`csrc`) and ``reference`` run every operation. Others, of
`deltadiff.kernels` too, are for `lora_linear` alone: ``hopper``, and for weights in FP8 ``fp8`` and
``scaled_mm``. These two take the activations of the big products in FP8 as well, so they run only
if they are asked for: ``fp8`` is a kernel for sm_90, ``scaled_mm`` calls torch._scaled_mm.
`why_unavailable` looks at what is installed, the device, its compute capability and the dtype.
`dispatch` decides which of them runs a call.
"""

import importlib
from types import ModuleType

import torch

from ..checks import HALF_DTYPES, dtype_name
from ..errors import ArgumentError, ArgumentTypeError

TRITON_BACKENDS = ("hopper", "fp8", "scaled_mm", "triton")  # of `deltadiff.kernels`
BACKENDS = (*TRITON_BACKENDS, "cpp", "reference")

HALF_NAMES = " and ".join(map(dtype_name, HALF_DTYPES))

# The modules that launch the kernels of lora_linear from Python, by the name of the kernel. Each
# has `lora_linear_fwd` and `lora_linear_bwd`; those of `portable` describe the arguments. "fp8" and
# "scaled_mm" take a weight in FP8 instead of a matrix.
LAUNCHERS: dict[str, ModuleType] = {}

try:
    importlib.import_module("deltadiff._C")  # registers torch.ops.deltadiff
    CPP_MISSING = None
except ImportError as error:
    CPP_MISSING = f"the C++ extension is not built ({error}); install with a C++ compiler present"

try:
    import triton

    from ..kernels.lora_linear import few_tokens, portable
    from ..kernels.lora_linear_fp8 import scaled_mm

    LAUNCHERS |= {"few_tokens": few_tokens, "portable": portable, "scaled_mm": scaled_mm}
    _TRITON_MISSING = None
except ImportError as error:
    _TRITON_MISSING = f"Triton cannot be imported ({error})"

try:
    from ..kernels.lora_linear import hopper_launch
    from ..kernels.lora_linear_fp8 import launch as fp8_launch

    LAUNCHERS |= {"hopper": hopper_launch, "fp8": fp8_launch}
    _GLUON_MISSING = None
except (ImportError, AttributeError) as error:  # Gluon is experimental, its names change
    _GLUON_MISSING = f"this Triton's Gluon is not the one that the kernel is written in ({error})"


def check_backend(backend: object) -> None:
    """Raise where ``backend`` is no name. `choose_path` says whether it is that of a backend."""
    if not isinstance(backend, str):
        accepted = f"None or one of {', '.join(BACKENDS)}"
        raise ArgumentTypeError("backend", type(backend).__name__, accepted)


def why_unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when ``backend`` can run ``dtype`` on ``device``, else the reason in words."""
    if backend not in BACKENDS:
        raise ArgumentError("backend", repr(backend), f"None or one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return None
    if dtype == torch.float64:
        return "float64 goes to the reference"
    if backend == "cpp":
        if device.type != "cpu":
            return f"the C++ kernels run on the CPU, not on {device.type}"
        return CPP_MISSING
    reasons = {"triton": _why_no_triton, "scaled_mm": _why_no_scaled_mm}
    return reasons.get(backend, _why_no_hopper)(device, dtype)


def _why_no_triton(device: torch.device, dtype: torch.dtype) -> str | None:
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


def _why_no_scaled_mm(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in HALF_DTYPES:
        return f"products in FP8 are for {HALF_NAMES}"
    if reason := _why_no_triton(device, dtype):
        return reason
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 9):
        return f"products in FP8 need sm_89 or newer, unlike {device}"
    return None


def _why_no_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "the sm_90 kernels are for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        return f"the sm_90 kernels need sm_90; {device} is sm_{major}{minor}"
    if dtype not in HALF_DTYPES:
        return f"the sm_90 kernels are for {HALF_NAMES}"
    return _TRITON_MISSING or _GLUON_MISSING
