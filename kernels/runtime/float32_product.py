"""Products of float32 matrices on tensor cores, as sums of products that tensor cores can do."""

import torch
import triton
import triton.language as tl

from . import gpu


def product_precision(rounded: bool, device: torch.device) -> str:
    """How to make a float32 product: "tf32x3", or from bfloat16 pieces "bf16x6" or "bf16x3".

    "bf16x3" is exact to 2**-16, which is enough if the result is ``rounded`` to 16 bits anyway. The
    others are as exact as float32 itself.
    """
    # Three bfloat16 pieces may take too many registers. The interpreter, which has the capability
    # (0, 0), knows tf32 only.
    if gpu.multiplies_from_registers(gpu.capability(device)):
        return "tf32x3"
    return "bf16x3" if rounded else "bf16x6"


@triton.jit
def _pieces(x):
    """Three bfloat16 that add up to a float32. Infinities become NaN."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def float32_product(left, right, PRECISION: tl.constexpr):
    """left @ right of float32 matrices. The small products are added first."""
    acc = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    if PRECISION == "tf32x3":
        return tl.dot(left, right, acc, input_precision="tf32x3")
    else:
        l0, l1, l2 = _pieces(left)
        r0, r1, r2 = _pieces(right)
        if PRECISION == "bf16x6":
            acc = tl.dot(l2, r0, acc)
            acc = tl.dot(l0, r2, acc)
            acc = tl.dot(l1, r1, acc)
        acc = tl.dot(l1, r0, acc)
        acc = tl.dot(l0, r1, acc)
        return tl.dot(l0, r0, acc)


@triton.jit
def swap_pairs(x):
    """The pairs of columns 0 to 15 of each 32 columns in the order 0, 4, 8, 12, 1, 5, ...

    Tensor cores give a thread one pair of each 8 columns of a product. If the columns are in this
    order, the thread's four pairs are 8 neighbours: the 16 bytes of W that it loads at once. The
    function is its own inverse.
    """
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 32, 4, 4, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2, 4)), x.shape)
