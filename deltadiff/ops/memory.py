"""Checks of memory: an operation in place needs memory of its own for everything that it writes."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError


class _Extent(NamedTuple):
    """The bytes from the first to the last element of a tensor."""

    start: int
    end: int
    name: str
    written: bool
    tensor: Tensor


def check_memory(
    written: Iterable[tuple[str, Tensor | None]], read: Iterable[tuple[str, Tensor | None]]
) -> None:
    """Raise where two elements that are written, or one of them and one that is read, are the same.

    Both arguments are names with tensors of one device. Tensors may lie between the elements of
    each other, as two halves of the columns of one matrix do.
    """
    extents = []
    for named, is_written in ((written, True), (read, False)):
        for name, t in named:
            # What torch.compile traces with has no memory.
            if t is None or t.numel() == 0 or type(t) not in (Tensor, torch.nn.Parameter):
                continue
            if is_written:
                _check_written(name, t)
            size = 1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))
            start = t.data_ptr()
            extents.append(_Extent(start, start + size * t.element_size(), name, is_written, t))
    extents.sort(key=lambda e: e[:2])
    open_: list[_Extent] = []
    for extent in extents:
        open_ = [e for e in open_ if e.end > extent.start]
        for other in open_:
            if (extent.written or other.written) and _share(other, extent):
                first, second = (other, extent) if other.written else (extent, other)
                given = f"memory that {second.name} has too"
                raise ArgumentError(first.name, given, "memory of its own for each tensor")
        open_.append(extent)


def _check_written(name: str, t: Tensor) -> None:
    if t.is_meta:
        raise ArgumentTypeError(name, "a tensor on meta", "a tensor with memory")
    if t.is_inference() and not torch.is_inference_mode_enabled():
        accepted = "a call in torch.inference_mode, or a tensor that was made outside of it"
        raise ArgumentTypeError(name, "an inference tensor", accepted)
    if t.is_neg() or t.is_conj():
        raise ArgumentTypeError(name, "a view that negates", "a tensor (`resolve_neg()` gives one)")
    if _overlaps_itself(t):
        given = f"strides {t.stride()}, by which several elements are one"
        raise ArgumentError(name, given, "memory of its own for each element (`contiguous()`)")


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two elements of a matrix are one; of more dimensions, contiguous ones are taken."""
    dims = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]
    if any(s == 0 for _, s in dims):
        return True
    if len(dims) != 2:
        return len(dims) > 2 and not t.is_contiguous()
    (n, s), (m, u) = dims  # element (i, j) is (i + u / g, j - s / g), with g their divisor
    divisor = math.gcd(s, u)
    return u // divisor < n and s // divisor < m


def _share(a: _Extent, b: _Extent) -> bool:
    """Whether two tensors whose extents overlap share a byte: marks those of one in a copy."""
    start = min(a.start, b.start)
    marks = torch.zeros(max(a.end, b.end) - start, dtype=torch.bool)
    views = []
    for e in (a, b):
        size, t = e.tensor.element_size(), e.tensor
        strides = [s * size for s in t.stride()]
        views.append(marks.as_strided((*t.shape, size), (*strides, 1), e.start - start))
    views[0].fill_(True)
    return bool(views[1].any())
