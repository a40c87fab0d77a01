"""The paths of every operation: what can run a call, down to the kernel, and in which dtypes.

Every path has its name on every machine, so that the number of a case means the same everywhere;
`why_not` says why one is not here.
"""

import torch

from ...checks import DTYPES, HALF_DTYPES
from ...ops.backends import LAUNCHERS, why_unavailable
from ...ops.dispatch import FP8_PRODUCTS, KERNELS

# Beside the kernels themselves: calls of the sm_90 kernel whose factors are packed for it first.
PACKED = "hopper packed"
BACKENDS = ("reference", "cpp", "triton")
# Activations in FP8 are compared with those of the reference, by `lora_linear_fp8` without --full.
KERNEL_LABELS = tuple(
    kernel.label for kernel in reversed(KERNELS) if kernel.backend not in FP8_PRODUCTS
)
WITH_PACKED = (*KERNEL_LABELS, PACKED)
PATHS = {
    "lora_linear": WITH_PACKED,
    "decode_4bit": WITH_PACKED,  # and `lora_linear` over what is decoded
    "decode_fp8": WITH_PACKED,
    "gated_mlp": WITH_PACKED,  # that of its first layer; the others run on the same backend
    "derivatives": KERNEL_LABELS,
    "delta_update": BACKENDS,
    "adamw_step": BACKENDS,
    "step_counters": ("reference", "triton"),
}


def backend_of(path: str) -> str:
    return path.partition(" ")[0]


def dtypes_of(op: str, path: str) -> list[tuple[torch.dtype, torch.dtype]]:
    """The pairs of dtypes, of the large tensors and of those beside them, that a path takes."""
    if op == "step_counters":  # the dtype of the factors on the ranks
        return [(torch.float32,) * 2, (torch.float64,) * 2]
    pairs = [(dtype, dtype) for dtype in DTYPES] + [(half, torch.float32) for half in HALF_DTYPES]
    if backend_of(path) == "hopper" or path == "triton few_tokens":
        pairs = [pair for pair in pairs if pair[0] in HALF_DTYPES]
    if path == "hopper":  # factors in another dtype are packed
        pairs = [pair for pair in pairs if pair[0] == pair[1]]
    return [pair for pair in pairs if pair[0] != torch.float64 or path == "reference"]


def why_not(op: str, path: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None where the path can run this dtype on ``device``, else the reason in words."""
    backend = backend_of(path)
    if op == "step_counters":  # its tensors are of integers, but for the factors on the ranks
        dtype = torch.float32
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        return (
            why_unavailable(backend, device, torch.float32)
            or "Triton's interpreter gets bfloat16 products and rounding wrong"
        )
    return why_unavailable(backend, device, dtype)


def needs_packing(lora_A: torch.Tensor, lora_B: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the sm_90 kernel has these factors packed."""
    return not LAUNCHERS["hopper"].needs_no_packing(lora_A, lora_B, dtype)
