"""What launchers ask about the GPU and its streams. Without a GPU there are answers too."""

import contextlib
import functools

import torch

# Shared memory that one block can have, in KiB, by compute capability. An unknown one gets the
# smallest, which every GPU since sm_80 has.
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


LEAST_SHARED_KIB = 99


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def multiplies_from_registers(capability: tuple[int, int]) -> bool:
    """Whether tensor cores take operands from registers alone: on sm_8x, and again on sm_12x.

    Kernels there have fewer registers left for what they keep.
    """
    return capability < (9, 0) or capability >= (12, 0)


def shared_kib(device: torch.device) -> int:
    """Shared memory that launch configurations may count on, in KiB."""
    return SHARED_KIB.get(capability(device), LEAST_SHARED_KIB)


def on_device(device: torch.device):
    """A context in which Triton launches on ``device``; it costs nothing if that is current."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def is_capturing(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph that is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the stream that launches go to; 0 without a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
