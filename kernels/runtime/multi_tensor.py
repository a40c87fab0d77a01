"""What launchers share: tables that let one launch serve a list of tensors, and device facts."""

import contextlib
import functools

import torch
import triton
import triton.language as tl

from .async_copy import current_stream, is_capturing, send

# Shared memory that one block can have, in KiB. A capability that is not here gets the smallest,
# which every GPU since sm_80 has.
SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


LEAST_SHARED_KIB = 99


# A table holds untyped addresses: the kernel is told what is there.
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) where Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def shared_kib(device: torch.device) -> int:
    """Shared memory that launch configurations may count on."""
    return SHARED_KIB.get(capability(device), LEAST_SHARED_KIB)


def on_device(device: torch.device):
    """Triton launches on the current device: make it the inputs' one, at no cost where it is."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def device_numbers(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``numbers`` as a vector on the device, sent only where they are new; not to be written."""
    if is_capturing(device):
        return new_numbers(numbers, dtype, device)
    # A copy in flight is ordered with its own stream alone, so the stream belongs to the key.
    return _cached_numbers(numbers, dtype, device, current_stream(device))


@functools.lru_cache(maxsize=32)
def _cached_numbers(numbers, dtype, device, stream):
    return new_numbers(numbers, dtype, device)


def new_numbers(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`device_numbers` of one's own, which may be written."""
    values = torch.tensor(numbers, dtype=dtype)
    return send(values, torch.empty_like(values, device=device))


def index_type(r: int, *tensors):
    """Type of offsets within a tile; what is larger than a tile is in the pointers, in 64 bits."""
    largest = max(stride for t in tensors for stride in t.stride())
    return tl.int32 if largest * (256 + r) < 2**31 else tl.int64


@triton.jit
def find_row(table_ptr, n, tile, BLOCK_SIZE: tl.constexpr = 256):
    """Number of the tensor that ``tile`` belongs to; one wide look, no chain of dependent loads."""
    started = 0
    for start in range(0, n, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        first = tl.load(table_ptr + offs, mask=offs < n, other=0x7FFFFFFFFFFFFFFF)
        started += tl.sum((first <= tile).to(tl.int32))
    return started - 1
