"""The kernel of `delta_update.py`: W += scale (dB A' + B dA) for a list of weights.

With B = B' - dB this is one product of rank 2r, [dB, B' - dB] @ [A'; dA], which tensor cores
compute (`runtime/float32_product.py`). A program owns a strip of one weight: it goes along some
rows tile by tile, loads W ahead and stores it once. A table on the device
(`runtime/multi_tensor.py`) says where the strips of each weight start, and holds its addresses,
strides, sizes and scale.

Random bits and remainders are bit for bit those of `deltadiff.ops.reference`: they come from
integer arithmetic on the bits of the float32 value, and from a Philox counter that depends on the
element's place alone.
"""

import triton
import triton.language as tl

from .runtime.float32_product import float32_product, swap_pairs
from .runtime.multi_tensor import find_row
from .runtime.philox import bits_of_blocks, bits_of_elements
from .runtime.rounding import join_remainder, round_stochastic, split_remainder

# A row of the table: the addresses of W, A', B', dA, dB and the remainder; two strides of each; N,
# K and r; the bits of the scale; the position in the list; whether all matrices are dense; and the
# number of the first row of W, which may be a part of a larger weight.
W, A, B, DELTA_A, DELTA_B, REMAINDER = (tl.constexpr(i) for i in range(6))


STRIDES, SIZES, SCALE, INDEX, DENSE, FIRST_ROW, COLUMNS = (
    tl.constexpr(i) for i in (6, 18, 21, 22, 23, 24, 25)
)  # fmt: skip


# The product goes over the rank in steps of 16, the least that `tl.dot` takes. If there are at most
# MAX_KEPT_BLOCKS steps, the left factor, which all tiles of a strip share, stays in registers.
RANK_BLOCK = tl.constexpr(16)


MAX_KEPT_BLOCKS = 4


@triton.jit
def _matrix(
    row, which: tl.constexpr, dtype: tl.constexpr, dense: tl.constexpr, align: tl.constexpr
):
    """(pointer, stride, stride) of one matrix of a weight.

    Dense rows start at multiples of ``align`` elements.
    """
    pointer = tl.load(row + which).to(tl.pointer_type(dtype))
    stride_0 = tl.load(row + STRIDES + 2 * which)
    if dense:
        pointer = tl.multiple_of(pointer, 2 * align)
        return pointer, tl.multiple_of(stride_0.to(tl.int32), align), 1
    else:
        return pointer, stride_0, tl.load(row + STRIDES + 2 * which + 1)


@triton.jit
def _left(b, db, scale, n0, start, N, R, BLOCK_SIZE_N):
    """Columns ``start`` to ``start`` + RANK_BLOCK of [dB, B' - dB], times the scale."""
    b_ptr, stride_bn, stride_br = b
    db_ptr, stride_dbn, stride_dbr = db
    b_ptr += n0.to(tl.int64) * stride_bn  # pointers take the large offsets, in 64 bits
    db_ptr += n0.to(tl.int64) * stride_dbn
    offs_n, offs_r = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, RANK_BLOCK)[None, :] + start
    is_db, mask = offs_r < R, (offs_n < N - n0) & (offs_r < 2 * R)
    offs_r = tl.where(is_db, offs_r, offs_r - R)
    delta = tl.load(db_ptr + (offs_n * stride_dbn + offs_r * stride_dbr), mask=mask, other=0.0)
    new = tl.load(b_ptr + (offs_n * stride_bn + offs_r * stride_br), mask=mask, other=0.0)
    return scale * tl.where(is_db, delta, new.to(tl.float32) - delta)


@triton.jit
def _right(a, da, k0, start, K, R, BLOCK_SIZE_K):
    """Rows ``start`` to ``start`` + RANK_BLOCK of [A'; dA], BLOCK_SIZE_K columns of them."""
    a_ptr, stride_ar, stride_ak = a
    da_ptr, stride_dar, stride_dak = da
    offs_r, offs_k = tl.arange(0, RANK_BLOCK)[:, None] + start, tl.arange(0, BLOCK_SIZE_K)[None, :]
    mask_k, is_a = offs_k < K - k0, offs_r < R
    a_ptr += tl.cast(k0, tl.int64) * stride_ak
    da_ptr += tl.cast(k0, tl.int64) * stride_dak - R.to(tl.int64) * stride_dar
    a_ptrs = a_ptr + (offs_r * stride_ar + offs_k * stride_ak)
    da_ptrs = da_ptr + (offs_r * stride_dar + offs_k * stride_dak)
    if a_ptr.dtype == da_ptr.dtype:
        return tl.load(tl.where(is_a, a_ptrs, da_ptrs), mask=mask_k & (offs_r < 2 * R), other=0.0)
    else:
        new = tl.load(a_ptrs, mask=mask_k & is_a, other=0.0)
        delta = tl.load(da_ptrs, mask=mask_k & (offs_r >= R) & (offs_r < 2 * R), other=0.0)
        return new.to(tl.float32) + delta  # one of them is zero


@triton.jit
def _update_strip(
    row, n0, first, seed, step, apply,
    dense: tl.constexpr, rounding: tl.constexpr, w_dtype: tl.constexpr,
    adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES: tl.constexpr,
    KEPT_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Update a strip: BLOCK_SIZE_N rows from ``n0`` on, TILES tiles from column ``first`` on."""
    N, K = tl.load(row + SIZES).to(tl.int32), tl.load(row + SIZES + 1).to(tl.int32)
    R = tl.load(row + SIZES + 2).to(tl.int32)
    if dense:
        K = tl.multiple_of(K, 8)
    # Offsets within a tile are small. Pointers take the large offsets, once.
    offs_n, offs_k = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, BLOCK_SIZE_K)[None, :]
    mask_n = offs_n < N - n0
    w_ptr, stride_wn, stride_wk = _matrix(row, W, w_dtype, dense, 8)
    w_ptrs = w_ptr + n0.to(tl.int64) * stride_wn + (offs_n * stride_wn + offs_k * stride_wk)
    if rounding == "remainder":
        low_ptr, stride_ln, stride_lk = _matrix(row, REMAINDER, remainder_dtype, dense, 8)
        low_ptrs = low_ptr + n0.to(tl.int64) * stride_ln + (offs_n * stride_ln + offs_k * stride_lk)
    elif rounding == "stochastic":
        index = tl.load(row + INDEX).to(tl.int32)
        row_0 = tl.load(row + FIRST_ROW) + n0
    a = _matrix(row, A, adapter_dtype, dense, 8)
    b = _matrix(row, B, adapter_dtype, dense, 1)
    da = _matrix(row, DELTA_A, tl.float32, dense, 8)
    db = _matrix(row, DELTA_B, tl.float32, dense, 1)
    scale = tl.load(row + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    lefts = ()
    for i in tl.static_range(KEPT_BLOCKS):
        lefts += (_left(b, db, scale, n0, i * RANK_BLOCK, N, R, BLOCK_SIZE_N),)
    last = tl.minimum(first + TILES * BLOCK_SIZE_K, K)
    for k0 in tl.range(first, last, BLOCK_SIZE_K, num_stages=STAGES):
        mask = mask_n & (offs_k < K - k0)
        w = tl.load(w_ptrs + tl.cast(k0, tl.int64) * stride_wk, mask=mask, other=0.0)
        if rounding == "remainder":
            low = tl.load(low_ptrs + tl.cast(k0, tl.int64) * stride_lk, mask=mask, other=0)
        # Each step has a sum of its own: tensor cores drop what is small beside a large sum.
        if KEPT_BLOCKS > 0:
            right = _right(a, da, k0, 0, K, R, BLOCK_SIZE_K)
            acc = float32_product(lefts[0], swap_pairs(right), PRECISION)
            for i in tl.static_range(1, KEPT_BLOCKS):
                right = _right(a, da, k0, i * RANK_BLOCK, K, R, BLOCK_SIZE_K)
                acc += float32_product(lefts[i], swap_pairs(right), PRECISION)
        else:
            acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_K), tl.float32)
            for start in range(0, 2 * R, RANK_BLOCK):
                left = _left(b, db, scale, n0, start, N, R, BLOCK_SIZE_N)
                right = _right(a, da, k0, start, K, R, BLOCK_SIZE_K)
                acc += float32_product(left, swap_pairs(right), PRECISION)
        acc = swap_pairs(acc)

        wide = acc + (join_remainder(w, low) if rounding == "remainder" else w.to(tl.float32))
        if rounding == "remainder":
            new, low = split_remainder(wide, w_dtype)
            tl.store(low_ptrs + tl.cast(k0, tl.int64) * stride_lk, low, mask=mask & (apply != 0))
        elif rounding == "stochastic":
            if dense:
                first_block = ((row_0 + tl.arange(0, BLOCK_SIZE_N)) * K + k0) >> 3
                random = bits_of_blocks(first_block, seed, step, index, BLOCK_SIZE_K // 8)
            else:
                element = (row_0 + offs_n) * K + (k0 + offs_k)
                random = bits_of_elements(element, seed, step, index)
            new = round_stochastic(wide, random, w_dtype)
        else:
            new = wide.to(w_dtype)
        tl.store(w_ptrs + tl.cast(k0, tl.int64) * stride_wk, new, mask=mask & (apply != 0))


@triton.jit(do_not_specialize=["n", "seed"])
def _delta_update_kernel(
    table_ptr, n, seed: tl.int64, step_ptr, apply_ptr,
    all_dense: tl.constexpr, rounding: tl.constexpr, w_dtype: tl.constexpr,
    adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES: tl.constexpr,
    KEPT_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Update the strip of this program."""
    # Only the stores of W use this value, so that no strip waits for it before it starts.
    apply = 1
    if apply_ptr is not None:
        apply = tl.where(tl.load(apply_ptr) != 0, 1, 0)
    strip = tl.program_id(0)
    i = find_row(table_ptr, n, strip)
    row = table_ptr + n + i * COLUMNS
    strip -= tl.load(table_ptr + i).to(tl.int32)
    strips_k = tl.cdiv(tl.load(row + SIZES + 1).to(tl.int32), TILES * BLOCK_SIZE_K)
    n0 = strip // strips_k * BLOCK_SIZE_N
    first = strip % strips_k * (TILES * BLOCK_SIZE_K)
    step = tl.load(step_ptr).to(tl.int32)
    if all_dense or tl.load(row + DENSE) != 0:
        _update_strip(
            row, n0, first, seed, step, apply, True, rounding,
            w_dtype, adapter_dtype, remainder_dtype,
            PRECISION, BLOCK_SIZE_N, BLOCK_SIZE_K, TILES, KEPT_BLOCKS, STAGES,
        )  # fmt: skip
    else:
        # Addresses with arbitrary strides take registers, so the tiles are small and no factor is
        # kept.
        for part in range(0, BLOCK_SIZE_N, 16):
            _update_strip(
                row, n0 + part, first, seed, step, apply, False, rounding,
                w_dtype, adapter_dtype, remainder_dtype,
                PRECISION, 16, 64, TILES * BLOCK_SIZE_K // 64, 0, 1,
            )  # fmt: skip
