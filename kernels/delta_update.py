"""Delta-LoRA's update of a whole list of weights in one launch: W += scale (dB A' + B dA).

With B = B' - dB this is one product of rank 2r, [dB, B' - dB] @ [A'; dA], on tensor cores: each
float32 is split into pieces, whose products are summed in float32. A program owns one tile of one
weight, reads it once and writes it once. Where the tiles of each weight start, and all that is
particular to a weight, stands in a table on the device.

Random bits and remainders are bit for bit the reference's: integer arithmetic on the bits of the
float32 value, and a Philox counter that is made of the element's place alone.
"""

import struct

import torch
import triton
import triton.language as tl

from . import tuned
from .launch import launch
from .philox import bits_of_blocks, bits_of_elements
from .send import send
from .tables import TRITON_DTYPES, capability, device_numbers, find_row, new_numbers, on_device

# A row of the table: the pointers of W, A', B', dA, dB and the remainder; their strides, two each;
# then N, K, r, the bits of the scale, the position in the list, and whether the tile is dense.
W, A, B, DELTA_A, DELTA_B, REMAINDER = (tl.constexpr(i) for i in range(6))
STRIDES, SIZES, SCALE, INDEX, DENSE, COLUMNS = (tl.constexpr(i) for i in (6, 18, 21, 22, 23, 24))

# Columns of [dB, B' - dB] to one step of the product: the least that `tl.dot` takes.
RANK_BLOCK = tl.constexpr(16)


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
def _swap_pairs(x):
    """The pairs 0 to 15 of each 32 columns in the order 0, 4, 8, 12, 1, 5, ...; its own inverse.

    Of each 8 columns of a product, tensor cores give a thread one pair. Of columns in this order,
    four times that are 8 neighbours: what a thread loads of W at once, in 16 bytes.
    """
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // 32, 4, 4, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2, 4)), x.shape)


@triton.jit
def _product(
    row, n0, k0, N, K, R,
    dense: tl.constexpr, one_block: tl.constexpr, adapter_dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    """The tile of [dB, B' - dB] @ [A'; dA] that starts at (n0, k0)."""
    a_ptr, stride_ar, stride_ak = _matrix(row, A, adapter_dtype, dense, 8)
    da_ptr, stride_dar, stride_dak = _matrix(row, DELTA_A, tl.float32, dense, 8)
    b_ptr, stride_bn, stride_br = _matrix(row, B, adapter_dtype, dense, 1)
    db_ptr, stride_dbn, stride_dbr = _matrix(row, DELTA_B, tl.float32, dense, 1)
    # What is far away goes to the pointers, in 64 bits; dA's rows come after the R of A'.
    a_ptr += k0 * stride_ak
    da_ptr += k0 * stride_dak - R.to(tl.int64) * stride_dar
    b_ptr += n0 * stride_bn
    db_ptr += n0 * stride_dbn
    offs_n, offs_k = tl.arange(0, BLOCK_SIZE_N)[:, None], tl.arange(0, BLOCK_SIZE_K)[None, :]
    mask_n, mask_k = offs_n < N - n0, offs_k < K - k0
    acc = tl.zeros((BLOCK_SIZE_N, BLOCK_SIZE_K), tl.float32)
    for start in range(0, RANK_BLOCK if one_block else 2 * R, RANK_BLOCK):
        offs_r = start + tl.arange(0, RANK_BLOCK)[None, :]
        is_db, mask = offs_r < R, mask_n & (offs_r < 2 * R)
        offs_r = tl.where(is_db, offs_r, offs_r - R)
        db = tl.load(db_ptr + (offs_n * stride_dbn + offs_r * stride_dbr), mask=mask, other=0.0)
        b = tl.load(b_ptr + (offs_n * stride_bn + offs_r * stride_br), mask=mask, other=0.0)
        left = tl.where(is_db, db, b.to(tl.float32) - db)
        offs_r = tl.arange(0, RANK_BLOCK)[:, None]
        mask = mask_k & (offs_r < R - start)
        a = tl.load(a_ptr + (offs_r * stride_ar + offs_k * stride_ak), mask=mask, other=0.0)
        mask = mask_k & (offs_r >= R - start) & (offs_r < 2 * R - start)
        da = tl.load(da_ptr + (offs_r * stride_dar + offs_k * stride_dak), mask=mask, other=0.0)
        right = a.to(tl.float32) + da  # one of them is zero
        acc = tl.dot(left, _swap_pairs(right), acc, input_precision=PRECISION)
        a_ptr += RANK_BLOCK * stride_ar
        da_ptr += RANK_BLOCK * stride_dar
    return _swap_pairs(acc)


@triton.jit
def _update_tile(
    row, n0, k0, seed, step, apply,
    dense: tl.constexpr, one_block: tl.constexpr, rounding: tl.constexpr,
    w_dtype: tl.constexpr, adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
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

    acc = _product(
        row, n0, k0, N, K, R, dense, one_block, adapter_dtype,
        PRECISION, BLOCK_SIZE_N, BLOCK_SIZE_K,
    )  # fmt: skip
    scale = tl.load(row + SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    wide = (_join_remainder(w, low) if rounding == "remainder" else w.to(tl.float32)) + scale * acc

    if rounding == "remainder":
        new, low = _split_remainder(wide, w_dtype)
        tl.store(low_ptrs, low, mask=mask & (apply != 0))
    elif rounding == "stochastic":
        index = tl.load(row + INDEX).to(tl.int32)
        if dense:
            first_block = ((n0 + tl.arange(0, BLOCK_SIZE_N)) * K + k0) >> 3
            random = bits_of_blocks(first_block, seed, step, index, BLOCK_SIZE_K // 8)
        else:
            random = bits_of_elements((n0 + offs_n) * K + (k0 + offs_k), seed, step, index)
        new = _round_stochastic(wide, random, w_dtype)
    else:
        new = wide.to(w_dtype)
    tl.store(w_ptrs, new, mask=mask & (apply != 0))


@triton.jit(do_not_specialize=["n", "seed"])
def _delta_update_kernel(
    table_ptr, n, seed: tl.int64, step_ptr, apply_ptr,
    all_dense: tl.constexpr, one_block: tl.constexpr, rounding: tl.constexpr,
    w_dtype: tl.constexpr, adapter_dtype: tl.constexpr, remainder_dtype: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_SIZE_N: tl.constexpr, BLOCK_SIZE_K: tl.constexpr,
):  # fmt: skip
    # Looked at where W is stored: to wait here would cost every tile a trip to memory.
    apply = 1
    if apply_ptr is not None:
        apply = tl.where(tl.load(apply_ptr) != 0, 1, 0)
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
            row, n0, k0, seed, step, apply, True, one_block, rounding,
            w_dtype, adapter_dtype, remainder_dtype, PRECISION, BLOCK_SIZE_N, BLOCK_SIZE_K,
        )  # fmt: skip
    else:
        # Addresses of any strides take registers: a few rows at a time, or they would spill.
        for part in range(0, BLOCK_SIZE_N, 16):
            _update_tile(
                row, n0 + part, k0, seed, step, apply, False, one_block, rounding,
                w_dtype, adapter_dtype, remainder_dtype, PRECISION, 16, BLOCK_SIZE_K,
            )  # fmt: skip


# --------------------------------------------------------------- launch configuration


def delta_update_config(capability: tuple[int, int]) -> dict:
    """Blocks and warps. They do not change the result."""
    block_n = 64 if capability >= (9, 0) else 32  # older tensor cores take more registers
    return dict(BLOCK_SIZE_N=block_n, BLOCK_SIZE_K=64, num_warps=4, num_stages=1)


def product_precision(rounding: str, device: torch.device) -> str:
    """How a float32 product is made of tensor cores' ones: as exact as float32's own, or, where
    W is rounded to 16 bits anyway, to 2**-16."""
    # Before sm_90 three bfloat16 pieces take too many registers. The interpreter knows tf32 only.
    if capability(device) < (9, 0):
        return "tf32x3"
    return "bf16x3" if rounding in ("nearest", "stochastic") else "bf16x6"


# --------------------------------------------------------------------------- launcher


class DeltaUpdate:
    """The update of weights that stay where they are; the table is made once.

    Args:
        weights, ..., seed: as `deltadiff.delta_update_`; adapters of one dtype.
        positions: of the weights in their list, for the random bits; None is their order.
        make_table: `device_numbers` where one table may serve several calls.
    """

    def __init__(
        self, weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed,
        positions=None, make_table=new_numbers,
    ):  # fmt: skip
        w, a = weights[0], lora_As[0]
        self.device, self.seed, self.rows = w.device, seed, len(weights)
        self.matrices = list(
            zip(weights, lora_As, lora_Bs, delta_As, delta_Bs, remainders or weights, strict=True)
        )
        self.positions = range(self.rows) if positions is None else positions
        dtypes = (
            TRITON_DTYPES[w.dtype], TRITON_DTYPES[a.dtype],
            tl.int16 if w.dtype == torch.bfloat16 else tl.float16,
        )  # fmt: skip
        self.options = tuned.config(
            "delta_update", self.device, delta_update_config, (capability(self.device),),
            (2 * max(a.shape[0] for a in lora_As), w.element_size(), rounding),
        )  # fmt: skip
        self.blocks = self.options.pop("BLOCK_SIZE_N"), self.options.pop("BLOCK_SIZE_K")
        all_dense = all(_is_dense(*ts) for ts in self.matrices)
        one_block = all(2 * a.shape[0] <= RANK_BLOCK.value for a in lora_As)
        precision = product_precision(rounding, self.device)
        self.constants = all_dense, one_block, rounding, *dtypes, precision, *self.blocks
        self.key = *self.constants, *self.options.values()
        self.table = make_table(self._numbers(scales), torch.int64, self.device)

    def rescale(self, scales: list[float]) -> None:
        """Other scales, in place: a captured graph reads them at its next replay."""
        numbers = torch.tensor(self._numbers(scales), dtype=torch.int64)
        send(numbers, self.table)

    def _numbers(self, scales) -> tuple[int, ...]:
        rows, first_tiles, self.tiles = [], [], 0
        for position, ts, scale in zip(self.positions, self.matrices, scales, strict=True):
            w, a = ts[:2]
            first_tiles.append(self.tiles)
            rows.append((
                *(t.data_ptr() for t in ts), *(s for t in ts for s in t.stride()),
                *w.shape, a.shape[0], _float_bits(scale), position, _is_dense(*ts),
            ))  # fmt: skip
            self.tiles += triton.cdiv(w.shape[0], self.blocks[0]) * triton.cdiv(
                w.shape[1], self.blocks[1]
            )
        return (*first_tiles, *(number for row in rows for number in row))

    def __call__(self, step: torch.Tensor, apply: torch.Tensor | None) -> None:
        """The update, unless ``apply`` is 0. 0-dim tensors, ``step`` int64."""
        key = (
            *self.key, step.data_ptr() % 16,
            apply is None or (apply.dtype, apply.data_ptr() % 16),
        )  # fmt: skip
        with on_device(self.device):
            launch(
                _delta_update_kernel, (self.tiles,), key,
                self.table, self.rows, self.seed, step, apply,
                *self.constants, **self.options,
            )  # fmt: skip


def delta_update_(
    weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed, step, apply
):
    """The update of every weight, in place; see `deltadiff.delta_update_` for the arguments."""
    if apply is not None and apply.dtype == torch.bool:
        apply = apply.view(torch.int8)
    lists = weights, lora_As, lora_Bs, delta_As, delta_Bs, scales
    # One launch for each dtype of adapters, so usually one.
    for adapter_dtype in dict.fromkeys(a.dtype for a in lora_As):
        mine = [i for i, a in enumerate(lora_As) if a.dtype == adapter_dtype]
        own = ([ts[i] for i in mine] for ts in lists)
        low = [remainders[i] for i in mine] if remainders else []
        DeltaUpdate(*own, rounding, low, seed, mine, device_numbers)(step, apply)


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
