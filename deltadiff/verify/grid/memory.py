"""Tensors inside larger buffers, and what must not change beside them.

Inputs and what an operation updates are placed in buffers that are filled with NaN or infinity: it
must not leak in. What an operation allocates gets a border on both sides, and is filled with NaN
itself, so that an element never written shows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..tolerance import differing

BORDER = 256  # elements before and after; a multiple of 16 bytes, so that alignment stays


class Layout(NamedTuple):
    """How a matrix, or a vector, lies in its buffer; all numbers count elements."""

    offset: int = 0  # how far it begins after a multiple of 16 bytes
    gap: int = 0  # between rows
    step: int = 1  # from one element of a row to the next
    transposed: bool = False
    expanded: bool = False  # all rows are the first one

    def fits_tma(self) -> bool:
        """Whether rows of multiples of eight 16-bit elements start at multiples of 16 bytes."""
        return not self.transposed and self.step == 1 and self.offset == 0 and self.gap % 8 == 0

    def __str__(self) -> str:
        changed = (f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults[k])
        return "+".join(changed) or "dense"


DENSE = Layout()


class Memory:
    """Places tensors in buffers, each filled with ``fill`` where the tensor is not."""

    def __init__(self, fill: float):
        self.fill = fill
        self.placed: list[
            tuple[Tensor, Tensor, Tensor | None]
        ] = []  # buffer, copy, what may change

    def place(self, values: Tensor, layout: Layout = DENSE, written: bool = False) -> Tensor:
        """A tensor with these values, in memory of its own.

        Args:
            layout: of a matrix; of a vector it takes the offset and the step, of others the offset.
            written: whether the operation writes the tensor.
        """
        shape, strides = values.shape, values.contiguous().stride()
        if values.dim() == 2:
            rows, columns = shape
            if layout.transposed:
                strides = (layout.step, rows * layout.step + layout.gap)
            else:
                strides = (columns * layout.step + layout.gap, layout.step)
            if layout.expanded:
                strides = (0, layout.step)
        elif values.dim() == 1:
            strides = (layout.step,)
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        inside = last + 1 if values.numel() else 0
        fill = (
            self.fill if values.dtype.is_floating_point else -7 if values.dtype.is_signed else 249
        )
        buffer = torch.full(
            (2 * BORDER + layout.offset + inside,), fill, dtype=values.dtype, device=values.device
        )
        view = buffer.as_strided(shape, strides, BORDER + layout.offset)
        if layout.expanded and values.numel():
            view[:1].copy_(values[:1])
        else:
            view.copy_(values)
        self.placed.append((buffer, buffer.clone(), view if written else None))
        return view

    def disturbed(self) -> int:
        """How many elements changed that are no output."""
        total = 0
        for buffer, before, view in self.placed:
            if view is not None:
                inside = before.as_strided(view.shape, view.stride(), view.storage_offset())
                inside.copy_(view.detach())
            total += differing(buffer, before)
        return total


_ATEN = torch.ops.aten
ALLOCATIONS = {
    _ATEN.empty.memory_format, _ATEN.empty_strided.default, _ATEN.empty_like.default,
    _ATEN.new_empty.default, _ATEN.new_empty_strided.default,
}  # fmt: skip


class GuardedAllocations(TorchDispatchMode):
    """Puts borders around memory that is allocated inside, and fills it with NaN.

    It also sees the allocations inside of deltadiff's own operations, in C++ and in Python.
    """

    def __init__(self):
        super().__init__()
        self.made: list[tuple[Tensor, int]] = []  # buffer, elements between its borders

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "deltadiff":
            on_gpu = any(t.is_cuda for t in _tensors(args))
            key = torch._C.DispatchKey.CUDA if on_gpu else torch._C.DispatchKey.CPU
            with self:  # PyTorch has left the mode for this call
                return function.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        made = function(*args, **kwargs)
        if function not in ALLOCATIONS or not made.numel() or kwargs.get("pin_memory"):
            return made  # pinned memory is kept for later copies, which have to find it pinned
        sizes = zip(made.shape, made.stride(), strict=True)
        inside = 1 + sum((size - 1) * stride for size, stride in sizes)
        buffer = torch.empty(inside + 2 * BORDER, dtype=made.dtype, device=made.device)
        buffer.view(torch.uint8).fill_(255)  # that is NaN in every floating-point dtype
        self.made.append((buffer, inside))
        return buffer.as_strided(made.shape, made.stride(), BORDER)

    def overrun(self) -> int:
        """How many bytes of the borders were written."""
        total = 0
        for buffer, inside in self.made:
            for border in (buffer[:BORDER], buffer[BORDER + inside :]):
                total += (border.view(torch.uint8) != 255).sum().item()
        return total


def _tensors(values: Sequence) -> list[Tensor]:
    found = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return [t for t in found if isinstance(t, Tensor)]
