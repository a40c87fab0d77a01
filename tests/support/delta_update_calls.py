"""Arguments of `delta_update_`, and comparisons of weights."""

import torch

from deltadiff.checks import NO_ROUNDING, REMAINDER_DTYPES, ROUNDINGS
from deltadiff.ops.reference import join_remainder

F32 = torch.float32


def roundings(dtype):
    """The roundings that a weight of this dtype can have."""
    return ROUNDINGS if dtype in REMAINDER_DTYPES else [NO_ROUNDING]


def remainder_like(w):
    """The remainder that a 16-bit weight starts with."""
    return torch.zeros(w.shape, dtype=REMAINDER_DTYPES[w.dtype], device=w.device)


def factors(make, n, k, r, adapter, device):
    """(A', B', dA, dB) in the dtypes that the operation takes."""
    shapes = (r, k), (n, r), (r, k), (n, r)
    dtypes = adapter, adapter, F32, F32
    return [make(*s, dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=True)]


def same_values(a, b):
    """Whether all elements are equal, with NaN equal to NaN."""
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def value(w, low):
    """The weight that W and its remainder, where it has one, hold."""
    return w if low is None else join_remainder(w, low)
