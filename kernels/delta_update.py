"""Delta-LoRA's update of a whole list of weights in one launch: W += scale (dB A' + B dA).

With B = B' - dB this is one product of rank 2r, [dB, B' - dB] @ [A'; dA], in float32. A program
owns one tile of one weight, reads it once and writes it once. Where the tiles of each weight start,
and all that is particular to a weight, stands in a table on the device.

Random bits and remainders are bit for bit the reference's: integer arithmetic on the bits of the
float32 value, and a Philox counter that is made of the element's place alone.
"""

import struct

import torch
import triton
import triton.language as tl

from .tables import TRITON_DTYPES, device_table, find_row, on_device

# A row of the table: the pointers of W, A', B', dA, dB and the remainder; their strides, two each;
# then N, K, r, the bits of the scale, the position in the list, and whether the tile is dense.
W, A, B, DELTA_A, DELTA_B, REMAINDER = (tl.constexpr(i) for i in range(6))
STRIDES, SIZES, SCALE, INDEX, DENSE, COLUMNS = (tl.constexpr(i) for i in (6, 18, 21, 22, 23, 24))


@triton.jit
def _random_words(block, seed, step, index):
    """The four random words of each block of eight elements."""
    zero = tl.zeros(block.shape, tl.int32)
    high = (block >> 32).to(tl.int32)
    return tl.philox(seed, block.to(tl.int32), high, zero + step, zero + index, n_rounds=7)


@triton.jit
def _bits_of_blocks(first_block, seed, step, index, BLOCKS: tl.constexpr):
    """16 bits an element for rows made of whole blocks: each Philox call serves eight elements."""
    blocks = first_block[:, None] + tl.arange(0, BLOCKS)[None, :]
    w0, w1, w2, w3 = _random_words(blocks, seed, step, index)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last two axes read w0, w1, w2, w3
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (first_block.shape[0], BLOCKS * 8)).to(tl.int32, bitcast=True)


@triton.jit
def _bits_of_elements(element, seed, step, index):
    """16 bits an element wherever blocks begin: one Philox call each."""
    w0, w1, w2, w3 = _random_words(element >> 3, seed, step, index)
    place = (element & 7).to(tl.int32)
    word = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
    half = tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32, bitcast=True)


@triton.jit
def _upper_half(bits):
    """The bfloat16 that is the upper half of these float32 bits."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _round_stochastic(wide, random, dtype: tl.constexpr):
    """Up with probability equal to the fraction lost. What is not finite stays so."""
    bits = wide.to(tl.int32, bitcast=True)
    finite = (bits & 0x7FFFFFFF) < 0x7F800000
    if dtype == tl.bfloat16:
        return tl.where(finite, _upper_half(bits + random), wide.to(tl.bfloat16))
    else:
        rounded = ((bits + (random >> 3)) & -0x2000).to(tl.float32, bitcast=True)
        # Below 2^-14 float16 has a fixed spacing of 2^-24.
        steps = tl.floor(tl.abs(wide) * 2.0**24 + (random >> 3).to(tl.float32) * 2.0**-13)
        small = steps * tl.where(bits < 0, -(2.0**-24), 2.0**-24)  # times, so that -0 stays
        rounded = tl.where(tl.abs(wide) < 2.0**-14, small, rounded)
        return tl.where(finite, rounded, wide).to(tl.float16)


@triton.jit
def _join_remainder(w, low):
    if w.dtype == tl.float16:
        return w.to(tl.float32) + low.to(tl.float32)
    else:
        high = w.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split_remainder(wide, dtype: tl.constexpr):
    if dtype == tl.float16:
        high = wide.to(tl.float16)
        return high, (wide - high.to(tl.float32)).to(tl.float16)
    else:
        bits = wide.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000  # the carry must not turn a NaN into a number
        high = tl.where(nan, bits, bits + 0x8000)
        low = tl.where(nan, 0, bits - (high & -0x10000))
        return _upper_half(high), low.to(tl.int16)


@triton.jit
def _matrix(
    row, which: tl.constexpr, dtype: tl.constexpr, dense: tl.constexpr, align: tl.constexpr
):
    """(pointer, stride, stride) of one matrix of a weight; ``align``: elements, of dense rows."""
    pointer = tl.load(row + which).to(tl.pointer_type(dtype))
    stride_0 = tl.load(row + STRIDES + 2 * which)
    if dense:
        pointer = tl.multiple_of(pointer, 2 * align)
        return pointer, tl.multiple_of(stride_0.to(tl.int32), align), 1
    else:
        return pointer, stride_0, tl.load(row + STRIDES + 2 * which + 1)


@triton.jit
def _zeros_like(w):
    """Float32 zeros made of w (its bits, shifted out), so that they are laid out as w was loaded.

    A sum that starts from them stays in that layout: loads of 16 bytes, nothing exchanged between
    threads, a third of the registers.
    """
    return ((w.to(tl.float32).to(tl.int32, bitcast=True) << 16) << 16).to(tl.float32)


@triton.jit
def _update_tile(
    row, n0, k0, seed, step,
    dense: tl.constexpr, rounding: tl.constexpr,
    w_dtype: tl.constexpr, adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """The whole update of the tile that starts at (n0, k0)."""
    N, K, R = tl.load(row + SIZES), tl.load(row + SIZES + 1), tl.load(row + SIZES + 2).to(tl.int32)
    if dense:
        K = tl.multiple_of(K, 8)
    # Offsets within the tile are small; what is large goes to the pointers, once.
    offs_n, offs_k = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, BLOCK_SIZE_K)[None, :]
    mask_n, mask_k = offs_n < N - n0, offs_k < K - k0
    mask = mask_n & mask_k
    w_ptr, stride_wn, stride_wk = _matrix(row, W, w_dtype, dense, 8)
    w_ptrs = w_ptr + n0 * stride_wn + k0 * stride_wk + (offs_n * stride_wn + offs_k * stride_wk)
    w = tl.load(w_ptrs, mask=mask, other=0.0)
    if rounding == "remainder":
        low_ptr, stride_ln, stride_lk = _matrix(row, REMAINDER, remainder_dtype, dense, 8)
        low_ptr += n0 * stride_ln + k0 * stride_lk
        low_ptrs = low_ptr + (offs_n * stride_ln + offs_k * stride_lk)
        low = tl.load(low_ptrs, mask=mask, other=0)

    a_ptr, stride_ar, stride_ak = _matrix(row, A, adapter_dtype, dense, 8)
    da_ptr, stride_dar, stride_dak = _matrix(row, DELTA_A, tl.float32, dense, 8)
    b_ptr, stride_bn, stride_br = _matrix(row, B, adapter_dtype, dense, 1)
    db_ptr, stride_dbn, stride_dbr = _matrix(row, DELTA_B, tl.float32, dense, 1)
    a_ptr += k0 * stride_ak
    da_ptr += k0 * stride_dak
    b_ptr += n0 * stride_bn
    db_ptr += n0 * stride_dbn
    # One rank after the other in float32, so that an element's sum has one order, whatever the
    # blocks. The rank is small: `tl.dot` would pad it, and needs more registers than W leaves.
    acc = _zeros_like(w)
    for _ in range(R):
        a = tl.load(a_ptr + offs_k * stride_ak, mask=mask_k, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + offs_k * stride_dak, mask=mask_k, other=0.0)
        b = tl.load(b_ptr + offs_n * stride_bn, mask=mask_n, other=0.0).to(tl.float32)
        db = tl.load(db_ptr + offs_n * stride_dbn, mask=mask_n, other=0.0)
        acc += db * a
        acc += (b - db) * da
        a_ptr += stride_ar
        da_ptr += stride_dar
        b_ptr += stride_br
        db_ptr += stride_dbr
    scale = tl.load(row + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    wide = (_join_remainder(w, low) if rounding == "remainder" else w.to(tl.float32)) + scale * acc

    if rounding == "remainder":
        new, low = _split_remainder(wide, w_dtype)
        tl.store(low_ptrs, low, mask=mask)
    elif rounding == "stochastic":
        index = tl.load(row + INDEX).to(tl.int32)
        if dense:
            first_block = ((n0 + tl.arange(0, BLOCK_SIZE_N)) * K + k0) >> 3
            random = _bits_of_blocks(first_block, seed, step, index, BLOCK_SIZE_K // 8)
        else:
            random = _bits_of_elements((n0 + offs_n) * K + (k0 + offs_k), seed, step, index)
        new = _round_stochastic(wide, random, w_dtype)
    else:
        new = wide.to(w_dtype)
    tl.store(w_ptrs, new, mask=mask)


@triton.jit(do_not_specialize=["n", "seed"])
def _delta_update_kernel(
    table_ptr, n, seed: tl.int64, step_ptr, apply_ptr,
    all_dense: tl.constexpr, rounding: tl.constexpr,
    w_dtype: tl.constexpr, adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    if apply_ptr is not None:
        if tl.load(apply_ptr) == 0:
            return
    tile = tl.program_id(0)
    i = find_row(table_ptr, n, tile)
    row = table_ptr + n + i * COLUMNS
    tile -= tl.load(table_ptr + i).to(tl.int32)
    blocks_k = tl.cdiv(tl.load(row + SIZES + 1), BLOCK_SIZE_K).to(tl.int32)
    n0 = (tile // blocks_k).to(tl.int64) * BLOCK_SIZE_N
    k0 = (tile % blocks_k).to(tl.int64) * BLOCK_SIZE_K
    step = tl.load(step_ptr).to(tl.int32)
    if all_dense or tl.load(row + DENSE) != 0:
        _update_tile(
            row, n0, k0, seed, step, True, rounding,
            w_dtype, adapter_dtype, remainder_dtype, BLOCK_SIZE_N, BLOCK_SIZE_K,
        )  # fmt: skip
    else:
        # Addresses of any strides take registers: a few rows at a time, or they would spill.
        for part in range(0, BLOCK_SIZE_N, 8):
            _update_tile(
                row, n0 + part, k0, seed, step, False, rounding,
                w_dtype, adapter_dtype, remainder_dtype, 8, BLOCK_SIZE_K,
            )  # fmt: skip


# --------------------------------------------------------------- launch configuration


def delta_update_config(itemsize: int) -> dict:
    """Blocks and warps. They do not change the result."""
    # Taller tiles read A' and dA less often; a float32 W leaves registers for shorter ones only.
    block_n = 64 if itemsize == 2 else 32
    return dict(BLOCK_SIZE_N=block_n, BLOCK_SIZE_K=128, num_warps=8, num_stages=1)


# --------------------------------------------------------------------------- launcher


def delta_update_(
    weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed, step, apply
):
    """The update of every weight, in place; see `deltadiff.delta_update_` for the arguments."""
    if apply is not None and apply.dtype == torch.bool:
        apply = apply.view(torch.int8)
    matrices = list(
        zip(weights, lora_As, lora_Bs, delta_As, delta_Bs, remainders or weights, strict=True)
    )
    # One launch for each dtype of adapters, so usually one.
    for adapter_dtype in dict.fromkeys(a.dtype for a in lora_As):
        config = delta_update_config(weights[0].element_size())
        rows, first_tiles, tiles, all_dense = [], [], 0, True
        for index, (ts, scale) in enumerate(zip(matrices, scales, strict=True)):
            w, a = ts[0], ts[1]
            if a.dtype != adapter_dtype:
                continue
            dense = _is_dense(*ts)
            all_dense &= dense
            first_tiles.append(tiles)
            rows.append((
                *(t.data_ptr() for t in ts), *(s for t in ts for s in t.stride()),
                *w.shape, a.shape[0], _float_bits(scale), index, dense,
            ))  # fmt: skip
            tiles += triton.cdiv(w.shape[0], config["BLOCK_SIZE_N"]) * triton.cdiv(
                w.shape[1], config["BLOCK_SIZE_K"]
            )
        device, w_dtype = weights[0].device, weights[0].dtype
        with on_device(device):
            _delta_update_kernel[(tiles,)](
                device_table(rows, first_tiles, device), len(rows), seed, step, apply,
                all_dense, rounding,
                TRITON_DTYPES[w_dtype], TRITON_DTYPES[adapter_dtype],
                tl.int16 if w_dtype == torch.bfloat16 else tl.float16, **config,
            )  # fmt: skip


def _is_dense(w, a, b, delta_a, delta_b, low) -> bool:
    """Rows without gaps between elements; the long ones load in 16-byte pieces."""
    return w.shape[1] % 8 == 0 and all(
        t.stride(1) == 1
        and t.stride(0) < 2**24
        and (short or (t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0))
        for t, short in ((w, 0), (a, 0), (b, 1), (delta_a, 0), (delta_b, 1), (low, 0))
    )


def _float_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]
