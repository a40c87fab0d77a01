"""Delta-LoRA's update of a whole list of weights in one launch: W += scale (dB A' + B dA).

With B = B' - dB this is one product of rank 2r, [dB, B' - dB] @ [A'; dA], on tensor cores: each
float32 is split into pieces, whose products are summed in float32. A program owns a strip of one
weight: some rows, which it goes along tile by tile, reading W ahead and writing it once. Where the
strips of each weight start, and all that is particular to a weight, stands in a table on the
device.

Random bits and remainders are bit for bit the reference's: integer arithmetic on the bits of the
float32 value, and a Philox counter that is made of the element's place alone.
"""

import math
import struct

import torch
import triton
import triton.language as tl

from .runtime import tuned
from .runtime.async_copy import send
from .runtime.cached_launch import launch
from .runtime.launch_cache import Seen
from .runtime.multi_tensor import TRITON_DTYPES, capability, find_row, new_numbers, on_device
from .runtime.philox import bits_of_blocks, bits_of_elements

# A row of the table: the pointers of W, A', B', dA, dB and the remainder; their strides, two each;
# then N, K, r, the bits of the scale, the position in the list, and whether the tile is dense.
W, A, B, DELTA_A, DELTA_B, REMAINDER = (tl.constexpr(i) for i in range(6))


STRIDES, SIZES, SCALE, INDEX, DENSE, COLUMNS = (tl.constexpr(i) for i in (6, 18, 21, 22, 23, 24))


# A product is made in steps of 16 ranks, the least that `tl.dot` takes. Up to so many steps the
# factor that serves all tiles of a strip stays in registers.
RANK_BLOCK = tl.constexpr(16)


MAX_KEPT_BLOCKS = 4


@triton.jit
def _upper_half(bits):
    """The bfloat16 that is the upper half of these float32 bits."""
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bits_of(wide):
    """The bits of float32 values, such that adding 16 bits leaves a NaN a NaN: the one that GPUs
    make is all ones."""
    return tl.minimum(wide.to(tl.int32, bitcast=True), 0x7FFF0000)


@triton.jit
def _round_stochastic(wide, random, dtype: tl.constexpr):
    """Up with probability equal to the fraction lost. What is not finite stays so."""
    bits = _bits_of(wide)
    if dtype == tl.bfloat16:
        return _upper_half(bits + random)
    else:
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
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
        bits = _bits_of(wide)
        high = bits + 0x8000
        return _upper_half(high), (bits - (high & -0x10000)).to(tl.int16)


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
def _swap_pairs(x):
    """The pairs 0 to 15 of each 32 columns in the order 0, 4, 8, 12, 1, 5, ...; its own inverse.

    Of each 8 columns of a product, tensor cores give a thread one pair. Of columns in this order,
    four times that are 8 neighbours: what a thread loads of W at once, in 16 bytes.
    """
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 32, 4, 4, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2, 4)), x.shape)


@triton.jit
def _left(b, db, scale, n0, start, N, R, BLOCK_SIZE_N):
    """RANK_BLOCK columns of [dB, B' - dB] from ``start`` on, times the scale."""
    b_ptr, stride_bn, stride_br = b
    db_ptr, stride_dbn, stride_dbr = db
    b_ptr += n0.to(tl.int64) * stride_bn  # what is far away goes to the pointers, in 64 bits
    db_ptr += n0.to(tl.int64) * stride_dbn
    offs_n, offs_r = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, RANK_BLOCK)[None, :] + start
    is_db, mask = offs_r < R, (offs_n < N - n0) & (offs_r < 2 * R)
    offs_r = tl.where(is_db, offs_r, offs_r - R)
    delta = tl.load(db_ptr + (offs_n * stride_dbn + offs_r * stride_dbr), mask=mask, other=0.0)
    new = tl.load(b_ptr + (offs_n * stride_bn + offs_r * stride_br), mask=mask, other=0.0)
    return scale * tl.where(is_db, delta, new.to(tl.float32) - delta)


@triton.jit
def _right(a, da, k0, start, K, R, BLOCK_SIZE_K):
    """RANK_BLOCK rows of [A'; dA] from ``start`` on, a tile of their columns."""
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
def _pieces(x):
    """Three bfloat16 that add up to a float32; what is not finite becomes NaN."""
    high = x.to(tl.bfloat16)
    x -= high.to(tl.float32)
    middle = x.to(tl.bfloat16)
    return high, middle, (x - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _product(left, right, PRECISION: tl.constexpr):
    """left @ right of float32, the small products first."""
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
def _update_strip(
    row, n0, first, seed, step, apply,
    dense: tl.constexpr, rounding: tl.constexpr, w_dtype: tl.constexpr,
    adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr, TILES: tl.constexpr,
    KEPT_BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The whole update of the rows from n0 on, TILES tiles from column ``first`` on."""
    N, K = tl.load(row + SIZES).to(tl.int32), tl.load(row + SIZES + 1).to(tl.int32)
    R = tl.load(row + SIZES + 2).to(tl.int32)
    if dense:
        K = tl.multiple_of(K, 8)
    # Offsets within the tile are small; what is large goes to the pointers, once.
    offs_n, offs_k = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, BLOCK_SIZE_K)[None, :]
    mask_n = offs_n < N - n0
    w_ptr, stride_wn, stride_wk = _matrix(row, W, w_dtype, dense, 8)
    w_ptrs = w_ptr + n0.to(tl.int64) * stride_wn + (offs_n * stride_wn + offs_k * stride_wk)
    if rounding == "remainder":
        low_ptr, stride_ln, stride_lk = _matrix(row, REMAINDER, remainder_dtype, dense, 8)
        low_ptrs = low_ptr + n0.to(tl.int64) * stride_ln + (offs_n * stride_ln + offs_k * stride_lk)
    elif rounding == "stochastic":
        index = tl.load(row + INDEX).to(tl.int32)
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
        # Each step's own sum first: tensor cores cut off what is small beside a large one.
        if KEPT_BLOCKS > 0:
            right = _right(a, da, k0, 0, K, R, BLOCK_SIZE_K)
            acc = _product(lefts[0], _swap_pairs(right), PRECISION)
            for i in tl.static_range(1, KEPT_BLOCKS):
                right = _right(a, da, k0, i * RANK_BLOCK, K, R, BLOCK_SIZE_K)
                acc += _product(lefts[i], _swap_pairs(right), PRECISION)
        else:
            acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_K), tl.float32)
            for start in range(0, 2 * R, RANK_BLOCK):
                left = _left(b, db, scale, n0, start, N, R, BLOCK_SIZE_N)
                right = _right(a, da, k0, start, K, R, BLOCK_SIZE_K)
                acc += _product(left, _swap_pairs(right), PRECISION)
        acc = _swap_pairs(acc)

        wide = acc + (_join_remainder(w, low) if rounding == "remainder" else w.to(tl.float32))
        if rounding == "remainder":
            new, low = _split_remainder(wide, w_dtype)
            tl.store(low_ptrs + tl.cast(k0, tl.int64) * stride_lk, low, mask=mask & (apply != 0))
        elif rounding == "stochastic":
            if dense:
                first_block = ((n0 + tl.arange(0, BLOCK_SIZE_N)).to(tl.int64) * K + k0) >> 3
                random = bits_of_blocks(first_block, seed, step, index, BLOCK_SIZE_K // 8)
            else:
                element = (n0 + offs_n).to(tl.int64) * K + (k0 + offs_k)
                random = bits_of_elements(element, seed, step, index)
            new = _round_stochastic(wide, random, w_dtype)
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
    # Looked at where W is stored: to wait here would cost every strip a trip to memory.
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
        # Addresses of any strides take registers: small tiles, and no factor kept.
        for part in range(0, BLOCK_SIZE_N, 16):
            _update_strip(
                row, n0 + part, first, seed, step, apply, False, rounding,
                w_dtype, adapter_dtype, remainder_dtype,
                PRECISION, 16, 64, TILES * BLOCK_SIZE_K // 64, 0, 1,
            )  # fmt: skip


# --------------------------------------------------------------- launch configuration


def delta_update_config(
    capability: tuple[int, int], rounding: str, rank: int, itemsize: int
) -> dict:
    """Blocks, tiles of a strip, warps and stages, for a product of rank ``rank``, which is 2r.

    They do not change the result.
    """
    if capability < (9, 0):  # older tensor cores take more registers
        return dict(BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, TILES=16, num_warps=4, num_stages=2)
    blocks = dict(BLOCK_SIZE_N=64, BLOCK_SIZE_K=64, TILES=8, num_warps=4)
    if rank > 16:  # more to compute: more programs at a time
        return dict(**blocks, num_stages=3)
    if rounding == "stochastic":
        return dict(**blocks, num_stages=4)
    if capability < (10, 0):  # where it fits the registers: memory likes long pieces of rows
        blocks["BLOCK_SIZE_K"] = 256 // itemsize
    return dict(**blocks, num_stages=3)


def product_precision(rounding: str, device: torch.device) -> str:
    """How a float32 product is made of tensor cores' ones: as exact as float32's own, or, where
    W is rounded to 16 bits anyway, to 2**-16."""
    # Before sm_90 three bfloat16 pieces take too many registers. The interpreter knows tf32 only.
    if capability(device) < (9, 0):
        return "tf32x3"
    return "bf16x3" if rounding in ("nearest", "stochastic") else "bf16x6"


# --------------------------------------------------------------------------- launcher


class DeltaUpdate:
    """The update of weights that stay where they are, none of which it holds; the table is made
    once.

    Args:
        weights, ..., seed: as `deltadiff.delta_update_`; adapters of one dtype.
        positions: of the weights in their list, for the random bits; None is their order.
    """

    def __init__(
        self, weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed,
        positions=None,
    ):  # fmt: skip
        w, a = weights[0], lora_As[0]
        self.device, self.seed, self.rows = w.device, seed, len(weights)
        matrices = list(
            zip(weights, lora_As, lora_Bs, delta_As, delta_Bs, remainders or weights, strict=True)
        )
        dtypes = (
            TRITON_DTYPES[w.dtype], TRITON_DTYPES[a.dtype],
            tl.int16 if w.dtype == torch.bfloat16 else tl.float16,
        )  # fmt: skip
        rank = 2 * max(a.shape[0] for a in lora_As)
        self.options = tuned.config(
            "delta_update", self.device, delta_update_config,
            (capability(self.device), rounding, rank, w.element_size()),
            (rank, w.element_size(), rounding),
        )  # fmt: skip
        names = ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "TILES", "num_stages")
        block_n, block_k, tiles, stages = (self.options.pop(name) for name in names)
        self.blocks, self.strip = (block_n, block_k), (block_n, block_k * tiles)
        all_dense = all(_is_dense(*ts) for ts in matrices)
        blocks = triton.cdiv(rank, RANK_BLOCK.value)
        self.constants = (
            all_dense, rounding, *dtypes, product_precision(rounding, self.device),
            block_n, block_k, tiles, blocks if blocks <= MAX_KEPT_BLOCKS else 0, stages,
        )  # fmt: skip
        self.key = *self.constants, *self.options.values()
        positions = range(self.rows) if positions is None else positions
        firsts, rows, self.strips = [], [], 0
        for position, ts in zip(positions, matrices, strict=True):
            w, a = ts[:2]
            firsts.append(self.strips)
            rows.append([
                *(t.data_ptr() for t in ts), *(s for t in ts for s in t.stride()),
                *w.shape, a.shape[0], 0, position, _is_dense(*ts),
            ])  # fmt: skip
            self.strips += math.prod(map(triton.cdiv, w.shape, self.strip))
        self._firsts, self._rows = firsts, rows
        self.table = new_numbers(self._numbers(scales), torch.int64, self.device)

    def rescale(self, scales: list[float]) -> None:
        """Other scales, in place: a captured graph reads them at its next replay."""
        send(torch.tensor(self._numbers(scales), dtype=torch.int64), self.table)

    def _numbers(self, scales) -> tuple[int, ...]:
        for row, scale in zip(self._rows, scales, strict=True):
            row[SCALE.value] = _float_bits(scale)
        return (*self._firsts, *(number for row in self._rows for number in row))

    def __call__(self, step: torch.Tensor, apply: torch.Tensor | None) -> None:
        """The update, unless ``apply`` is 0. 0-dim tensors, ``step`` int64."""
        key = (
            *self.key, step.data_ptr() % 16,
            apply is None or (apply.dtype, apply.data_ptr() % 16),
        )  # fmt: skip
        with on_device(self.device):
            launch(
                _delta_update_kernel, (self.strips,), key,
                self.table, self.rows, self.seed, step, apply, *self.constants,
                **self.options, num_stages=1,  # of loops that do not say how many
            )  # fmt: skip


_prepared = Seen()


def delta_update_(
    weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed, step, apply,
    key=None,
):  # fmt: skip
    """The update of every weight, in place; see `deltadiff.delta_update_` for the arguments.

    ``key``: stands for all of them but ``step`` and ``apply``; the launch of a key is prepared
    once.
    """
    if apply is not None and apply.dtype == torch.bool:
        apply = apply.view(torch.int8)

    def prepare() -> list[DeltaUpdate]:
        """One launch for each dtype of adapters, so usually one."""
        found, lists = [], (weights, lora_As, lora_Bs, delta_As, delta_Bs, scales)
        for adapter_dtype in dict.fromkeys(a.dtype for a in lora_As):
            mine = [i for i, a in enumerate(lora_As) if a.dtype == adapter_dtype]
            own = ([ts[i] for i in mine] for ts in lists)
            low = [remainders[i] for i in mine] if remainders else []
            found.append(DeltaUpdate(*own, rounding, low, seed, mine))
        return found

    for update in _prepared.get(key, prepare):
        update(step, apply)


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
