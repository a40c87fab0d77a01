"""Rounding of float32 values to 16 bits, bit for bit as in `deltadiff.ops.reference`.

A weight of 16 bits cannot hold every update. Apart from rounding to nearest, there are two ways to
keep what it loses: on average, by stochastic rounding; or exactly, in a *remainder* of 16 bits
beside the weight. Both work on the bits of the float32 value.

To add a rounding mode, add its name to `deltadiff.checks.ROUNDINGS` and its code here, in
`delta_update_kernel.py`, in `deltadiff/ops/reference.py` and in `csrc/delta_update_kernel.h`; its
test goes to `tests/ops/test_delta_update.py`, and `deltadiff verify` checks it by what
`verify/delta_update.py` knows of it. `dtypes.py` says what a new dtype needs.
"""

import triton
import triton.language as tl


@triton.jit
def _upper_half(bits):
    """The bfloat16 that is the upper half of these float32 bits."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bits_of(wide):
    """The bits of float32 values, limited so that adding 16 bits leaves a NaN a NaN.

    Without the limit the NaN that GPUs make, whose bits are all ones, would overflow.
    """
    return tl.minimum(wide.to(tl.int32, bitcast=True), 0x7FFF0000)


@triton.jit
def round_stochastic(wide, random, dtype: tl.constexpr):
    """Round away from zero with a probability equal to the fraction that rounding would drop.

    ``random`` has 16 random bits for each element. Infinities and NaNs stay what they are.
    """
    bits = _bits_of(wide)
    if dtype == tl.bfloat16:
        return _upper_half(bits + random)
    else:
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        rounded = ((bits + (random >> 3)) & -0x2000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 has a fixed spacing of 2^-24.
        steps = tl.floor(tl.abs(wide) * 2.0**24 + (random >> 3).to(tl.float32) * 2.0**-13)
        small = steps * tl.where(bits < 0, -(2.0**-24), 2.0**-24)  # a product keeps the sign of -0
        rounded = tl.where(tl.abs(wide) < 2.0**-14, small, rounded)
        return tl.where(finite, rounded, wide).to(tl.float16)


@triton.jit
def _unit_bits(w):
    """The bits of 2^-15 of a float16's last place; below 2^-14 its spacing is fixed."""
    exponent = w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(exponent, 113 << 23) - (25 << 23)


@triton.jit
def join_remainder(w, low):
    """The float32 value that a 16-bit weight and its remainder stand for."""
    if w.dtype == tl.float16:
        unit = _unit_bits(w).to(tl.float32, bitcast=True)
        # Less 0, so that -0 stays -0.
        return w.to(tl.float32) - (0 - low.to(tl.int32)).to(tl.float32) * unit
    else:
        high = w.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_remainder(wide, dtype: tl.constexpr):
    """A float32 value as a 16-bit weight and its remainder."""
    bits = _bits_of(wide)
    if dtype == tl.float16:
        high = tl.minimum(tl.maximum(wide, -65504.0), 65504.0)
        near = high.to(tl.float16).to(tl.float32)
        per_unit = ((254 << 23) - _unit_bits(near)).to(tl.float32, bitcast=True)
        count = tl.minimum(tl.maximum((wide - near) * per_unit, -32768.0), 32767.0)
        # The sum with 1.5 * 2^23 rounds to an integer, to nearest even, in the last bits.
        low = (count + 12582912.0).to(tl.int32, bitcast=True)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        high, low = tl.where(finite, high, wide).to(tl.float16), tl.where(finite, low, 0)
        return high, low.to(tl.int16)
    else:
        high = bits + 0x8000
        return _upper_half(high), (bits - (high & -0x10000)).to(tl.int16)
