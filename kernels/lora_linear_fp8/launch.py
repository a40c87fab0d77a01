"""The passes of `lora_linear` over a weight in FP8, with activations in FP8."""

from typing import NamedTuple

import torch
import triton

from ..lora_linear.hopper_launch import descriptor, multiprocessors, packed
from ..lora_linear.portable import adapter_gradients
from ..runtime.cached_launch import launch_cached, specialisation
from ..runtime.gpu import on_device
from ..runtime.tuned import padded_rank
from .product import COLUMNS, GROUPS, ROWS, fp8_product_kernel
from .quantise import STEP, quantised
from .transpose import transposed

STAGES = 4  # of shared memory, which they fill
GROUP_SIZE_M = 8
RANKS = 64  # of a step of the low-rank term


class Scales(NamedTuple):
    """The scales of W (N, K) as a product takes them, and how many steps share one of activations.

    A product over K takes them as they are, one over N those of W^T. There ``rows`` are factors of
    the columns of its activations, which are multiplied by them before they are quantised.
    """

    blocks: torch.Tensor | None  # of 128 x 128
    whole: torch.Tensor | None  # one for all of W
    rows: torch.Tensor | None  # (N,)
    steps: int

    @classmethod
    def of(cls, scale: torch.Tensor, block: tuple[int, int], columns: int) -> "Scales":
        """``columns``: of activations that share a scale, see `activation_columns`."""
        steps = columns // STEP
        if block == (STEP, STEP):
            return cls(scale, None, None, steps)
        if block[0] == 1:
            return cls(None, None, scale.view(-1), steps)
        return cls(None, scale, None, steps)


def lora_linear_fwd(x, weight, columns, lora_A, lora_B, scaling, gate, bias):
    """(y, S) for x (M, K): y in x.dtype, S = x A^T (M, r) float32 for the gradients.

    ``weight``: (data, scale, block) of W (N, K). ``columns``: of activations that share a scale.
    """
    data, scales = weight[0], Scales.of(*weight[1:], columns)
    with on_device(x.device):
        a, b = packed(lora_A, lora_B, x.dtype)
        x8, x_scales, s, u = quantised(x, a, scaling, gate, None, scales.steps)
        q_scales = scales.blocks if scales.whole is None else scales.whole
        y = product(x8, x_scales, data, q_scales, scales.rows, u, b, bias, scales.steps, False)
    return y, s


def lora_linear_bwd(dy, x, weight, columns, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, dA, dB, dgate), None for each that ``needs`` (x, A, B, gate) does not ask for.

    x may be None where dA is not asked for.
    """
    with on_device(dy.device):
        dx, _, t = _bwd_of_input(dy, weight, columns, lora_A, lora_B, scaling, gate, needs[0])
        return dx, *adapter_gradients(dy, x, lora_A, lora_B, kept, t, scaling, gate, needs)


def bwd_before_da(dy, weight, columns, lora_A, lora_B, kept, scaling, gate, needs):
    """(dx, V, dB, dgate) with V (M, R rounded up to a multiple of 8) = s g dY B, so dA = V^T x."""
    with on_device(dy.device):
        dx, v, t = _bwd_of_input(dy, weight, columns, lora_A, lora_B, scaling, gate, needs[0])
        _, db, dgate = adapter_gradients(dy, None, lora_A, lora_B, kept, t, scaling, gate, needs)
    return dx, v, db, dgate


def _bwd_of_input(dy, weight, columns, lora_A, lora_B, scaling, gate, need_x):
    """(dx, V, T) with T = dY B (M, r) float32 and V = s g T in the dtype of dY."""
    data, scales = weight[0], Scales.of(*weight[1:], columns)
    a, b = packed(lora_A, lora_B, dy.dtype)
    dy8, dy_scales, t, v = quantised(dy, b.T, scaling, gate, scales.rows, scales.steps)
    if not need_x:
        return None, v, t
    q_scales = scales.whole if scales.blocks is None else scales.blocks.T
    dx = product(
        dy8, dy_scales, transposed(data), q_scales, None, v, a, None, scales.steps, True
    )  # fmt: skip
    return dx, v, t


def product(v8, v_scales, q8, q_scales, row_scales, u, e, bias, steps_per_scale, transposed_e):
    """Y (M, N) = (V8 sv) (Q8 sq)^T + bias + U E^T in the dtype of U, see `product.py`.

    ``transposed_e``: E^T (R, N) is given instead of E.
    """
    (m, c), n, r = v8.shape, q8.shape[0], u.shape[1]
    bias = None if bias is None else bias.contiguous()
    y = u.new_empty((m, n))
    e_block = (RANKS, COLUMNS) if transposed_e else (COLUMNS, RANKS)
    ranks = min(RANKS, padded_rank(r))
    blocks_m, blocks_n = triton.cdiv(m, GROUPS * ROWS), triton.cdiv(n, COLUMNS)
    of_blocks = q_scales is not None and steps_per_scale == 1
    key = (
        u.dtype, ranks, transposed_e, steps_per_scale,
        *(None if t is None else specialisation(t) for t in (q_scales, row_scales, bias)),
    )  # fmt: skip
    launch_cached(
        fp8_product_kernel, (min(multiprocessors(v8.device), blocks_m * blocks_n),), key,
        descriptor(v8, ROWS, STEP), descriptor(q8, COLUMNS, STEP), descriptor(u, ROWS, RANKS),
        descriptor(e, *e_block), descriptor(y, ROWS, COLUMNS),
        v_scales, q_scales, row_scales, bias,
        v_scales.stride(0), *(q_scales.stride() if of_blocks else (0, 0)), m, n,
        triton.cdiv(c, STEP), triton.cdiv(r, RANKS), blocks_m, blocks_n,
        GROUPS, STAGES, GROUP_SIZE_M, transposed_e, ranks, steps_per_scale,
        num_warps=4, maxnreg=128,
    )  # fmt: skip
    return y
