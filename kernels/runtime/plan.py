"""Launches written down as numbers, so that C++ can issue them again with other tensors.

A plan is made without the tensors; a `Place` stands for each of them. `csrc/gpu_launch.h` reads the
numbers of one launch in this order: function, grid, threads, bytes of shared memory, number of
parameters. For each parameter follow its kind and

    POINTER       slot, offset in bytes
    INT32, INT64  value
    SCALING       nothing: the value is the one float32 that comes with the tensors
    DESCRIPTOR    slot, offset in bytes, type, bytes of an element, swizzle, block (2), shape (2),
                  strides (2)
"""

import math
from dataclasses import dataclass

import torch

from .dtypes import DTYPES

POINTER, INT32, INT64, SCALING, DESCRIPTOR = range(5)


INTEGERS = {"i32": INT32, "i64": INT64}


class CannotPlanError(RuntimeError):
    """A kernel needs a kind of launch that the numbers of a plan cannot express."""


@dataclass(frozen=True)
class Place:
    """Stands for a tensor: has all that Triton's compiler and TMA descriptors ask a tensor for.

    The address comes later, from ``slot`` of the addresses that C++ is given.
    """

    slot: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0  # bytes from the address in the slot
    misalignment: int = 0  # the address in the slot, modulo 16

    @classmethod
    def of(cls, slot: int, t: torch.Tensor | None) -> "Place | None":
        """The place of a tensor like ``t``; None for None."""
        if t is None:
            return None
        return cls(slot, t.dtype, tuple(t.shape), t.stride(), 0, t.data_ptr() % 16)

    @classmethod
    def dense(cls, slot: int, dtype: torch.dtype, shape: tuple, offset: int = 0) -> "Place":
        """The place of a contiguous tensor."""
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return cls(slot, dtype, tuple(shape), strides, offset)

    def data_ptr(self) -> int:
        """The address modulo 16, which is all that is known of it."""
        return (self.offset + self.misalignment) % 16

    def stride(self, dim: int | None = None):
        return self.strides if dim is None else self.strides[dim]

    def numel(self) -> int:
        return math.prod(self.shape)


class Workspace:
    """The memory that the launches of a plan need, as one tensor in one slot."""

    ALIGNMENT = 256

    def __init__(self, slot: int):
        self.slot, self.nbytes = slot, 0

    def empty(self, shape: tuple, dtype: torch.dtype) -> Place:
        """The place of a new contiguous tensor within this memory."""
        place = Place.dense(self.slot, dtype, shape, self.nbytes)
        blocks = -(-place.numel() * dtype.itemsize // self.ALIGNMENT)
        self.nbytes += blocks * self.ALIGNMENT
        return place


def write_down(kernel, grid: tuple[int, ...], *args, **options) -> list[int]:
    """The numbers of the launch ``kernel[grid](*args, **options)``, in which places are tensors.

    Raises:
        CannotPlanError: the kernel uses clusters or scratch memory, or has a parameter of a kind
            that is not in the list above.
    """
    compiled = kernel.warmup(*args, grid=grid, **options)
    _ = compiled.run  # this loads the kernel; before, its function has no address
    metadata = compiled.metadata
    warps, ctas, shared = compiled.packed_metadata
    extras = (
        "global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl",
    )  # fmt: skip
    if ctas != 1 or len(grid) != 1 or any(getattr(metadata, name) for name in extras):
        raise CannotPlanError(f"{metadata.name}: clusters, scratch memory or launch attributes")
    kinds, descriptors = compiled.src.signature.values(), iter(metadata.tensordesc_meta or ())
    parameters = [
        _parameter(arg, kind, descriptors)
        for arg, kind in zip(args, kinds, strict=True)
        if kind != "constexpr"
    ]
    numbers = [compiled.function, *grid, 32 * warps, shared, len(parameters)]
    return numbers + [number for parameter in parameters for number in parameter]


def _parameter(arg, kind: str, descriptors) -> list[int]:
    if kind.startswith("*") and isinstance(arg, Place):
        return [POINTER, arg.slot, arg.offset]
    if kind in INTEGERS:
        return [INTEGERS[kind], arg]
    if kind == "fp32":
        return [SCALING]
    meta = next(descriptors, None) if kind.startswith("tensordesc") else None
    facts = DTYPES.get(arg.base.dtype) if meta else None
    element = facts.tensor_map if facts else None
    if element is None or meta["fp4_padded"] or len(arg.shape) != 2 or arg.padding != "zero":
        raise CannotPlanError(f"a parameter of type {kind}")
    base, size = arg.base, meta["elem_size"]
    place = base.slot, base.offset, element, size, meta["swizzle"]
    return [DESCRIPTOR, *place, *meta["block_size"], *arg.shape, *arg.strides]
