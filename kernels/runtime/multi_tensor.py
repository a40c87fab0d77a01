"""Tables on the device, through which one launch serves a whole list of tensors.

A table is a vector of int64. It begins with the number of the first tile of each tensor; then come
rows of numbers, one row for each tensor, with its address and whatever else the kernel needs.
Addresses in a table have no type, so a kernel is told the dtypes.
"""

import functools

import torch
import triton
import triton.language as tl

from .async_copy import copy_async
from .gpu import current_stream, is_capturing


def device_numbers(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``numbers`` as a vector on the device, read-only. The same numbers are copied only once."""
    if is_capturing(device):
        return new_numbers(numbers, dtype, device)
    # Only its own stream waits for the copy, so each stream has a copy of its own.
    return _cached_numbers(numbers, dtype, device, current_stream(device))


@functools.lru_cache(maxsize=32)
def _cached_numbers(numbers, dtype, device, stream):
    return new_numbers(numbers, dtype, device)


def new_numbers(numbers: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``numbers`` as a new vector on the device, which the caller may write."""
    values = torch.tensor(numbers, dtype=dtype)
    return copy_async(values, torch.empty_like(values, device=device))


@triton.jit
def find_row(table_ptr, n, tile, BLOCK_SIZE: tl.constexpr = 256):
    """The index of the tensor that ``tile`` belongs to.

    It counts the tensors whose first tile is not behind ``tile``, many at a time; a binary search
    would be a chain of loads that wait for each other.
    """
    started = 0
    for start in range(0, n, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        first = tl.load(table_ptr + offs, mask=offs < n, other=0x7FFFFFFFFFFFFFFF)
        started += tl.sum((first <= tile).to(tl.int32))
    return started - 1
