"""The passes of `lora_linear` over a weight in FP8 by torch._scaled_mm, with activations in FP8.

For the GPUs after sm_80 that the kernel of `product.py` is not for. A scale of activations is for a
whole row, and the low-rank term is added to what the product gives, in its dtype.
"""

import torch
import triton

from ..lora_linear.portable import adapter_gradients
from ..runtime.gpu import on_device
from .quantise import STEP, quantised
from .transpose import transposed


def lora_linear_fwd(x, weight, columns, lora_A, lora_B, scaling, gate, bias):
    """As that of `launch.py`; ``columns`` are at least all of x and of dy."""
    data, rows, whole = _scales_of(weight)
    with on_device(x.device):
        x8, x_scales, s, u = _quantised(x, lora_A, scaling, gate, None)
        y = _product(x8, x_scales, data.T, _of_columns(rows, whole, data.shape[0]), x.dtype)
        if bias is not None:
            y += bias
        _add_low_rank(y, u, lora_B)
    return y, s


def lora_linear_bwd(dy, x, weight, columns, lora_A, lora_B, kept, scaling, gate, needs):
    """As that of `launch.py`."""
    with on_device(dy.device):
        dx, _, t = _bwd_of_input(dy, weight, lora_A, lora_B, scaling, gate, needs[0])
        return dx, *adapter_gradients(dy, x, lora_A, lora_B, kept, t, scaling, gate, needs)


def bwd_before_da(dy, weight, columns, lora_A, lora_B, kept, scaling, gate, needs):
    """As that of `launch.py`."""
    with on_device(dy.device):
        dx, v, t = _bwd_of_input(dy, weight, lora_A, lora_B, scaling, gate, needs[0])
        _, db, dgate = adapter_gradients(dy, None, lora_A, lora_B, kept, t, scaling, gate, needs)
    return dx, v, db, dgate


def _bwd_of_input(dy, weight, lora_A, lora_B, scaling, gate, need_x):
    """(dx, V, T) with T = dY B (M, r) float32 and V = s g T in the dtype of dY."""
    data, rows, whole = _scales_of(weight)
    dy8, dy_scales, t, v = _quantised(dy, lora_B.T, scaling, gate, rows)
    if not need_x:
        return None, v, t
    scales = _of_columns(None, whole, data.shape[1])
    dx = _product(dy8, dy_scales, transposed(data).T, scales, dy.dtype)
    _add_low_rank(dx, v, lora_A.T)
    return dx, v, t


def _scales_of(weight):
    """(data, scales of the rows or None, one for all of W or None)."""
    data, scale, block = weight
    return (data, scale.view(-1), None) if block[0] == 1 else (data, None, scale)


def _quantised(v, p, scaling, gate, factors):
    """`quantise.quantised` with one scale for each row, (M, 1)."""
    steps = triton.cdiv(v.shape[1], STEP)
    v8, scales, s, u = quantised(v, p, scaling, gate, factors, steps)
    return v8, scales.view(-1, 1), s, u


def _of_columns(rows, whole, n):
    """The scales of the N columns that a product gives, (1, N): those of W, or ones."""
    if rows is not None:
        return rows.view(1, n)
    return whole.expand(1, n).contiguous() if whole is not None else None


def _product(a8, a_scales, b8, b_scales, dtype):
    if b_scales is None:
        b_scales = torch.ones(1, b8.shape[1], device=b8.device)
    return torch._scaled_mm(a8, b8, scale_a=a_scales, scale_b=b_scales, out_dtype=dtype)


def _add_low_rank(y, u, e):
    """y += U E^T, of E (N, R)."""
    y.addmm_(u[:, : e.shape[1]], e.to(y.dtype).T)
