"""Delta-LoRA's update of a whole list of weights in one launch: W += scale (dB A' + B dA).

`delta_update_kernel.py` has the kernel, its table and how it computes.
"""

import math
import struct

import torch
import triton

from .delta_update_kernel import MAX_KEPT_BLOCKS, RANK_BLOCK, SCALE, _delta_update_kernel
from .runtime import gpu
from .runtime.async_copy import copy_async
from .runtime.cached_launch import launch_cached
from .runtime.dtypes import triton_dtype
from .runtime.float32_product import product_precision
from .runtime.launch_cache import LaunchCache
from .runtime.multi_tensor import new_numbers
from .runtime.tuned import LaunchConfig


def delta_update_config(
    capability: tuple[int, int], rounding: str, rank: int, itemsize: int
) -> dict:
    """Blocks, tiles of a strip, warps and stages. They do not change the result.

    ``rank`` is the rank of the product, 2r; ``itemsize`` is the bytes of an element of W.
    """
    if gpu.multiplies_from_registers(capability):
        return dict(BLOCK_SIZE_N=32, BLOCK_SIZE_K=64, TILES=16, num_warps=4, num_stages=2)
    blocks = dict(BLOCK_SIZE_N=64, BLOCK_SIZE_K=64, TILES=8, num_warps=4)
    if rank > 16:  # there is more to compute, so more programs should run at a time
        return dict(**blocks, num_stages=3)
    if rounding == "stochastic":
        return dict(**blocks, num_stages=4)
    if capability < (10, 0):  # it fits the registers, and long pieces of rows load faster
        blocks["BLOCK_SIZE_K"] = 256 // itemsize
    return dict(**blocks, num_stages=3)


DELTA_UPDATE = LaunchConfig(
    op="delta_update",
    default=delta_update_config,
    keys=("rank", "itemsize", "rounding"),
    entries=("BLOCK_SIZE_N", "BLOCK_SIZE_K", "TILES", "num_warps", "num_stages"),
    candidates=[
        {"BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "TILES": 1024 // k, "num_stages": stages}
        for n, k in ((32, 64), (64, 64), (32, 128), (64, 128))
        for stages in (2, 3, 4)
    ],
)


class DeltaUpdate:
    """The prepared update of weights whose addresses do not change. It keeps no tensor alive.

    Args:
        weights, ..., seed: as for `deltadiff.delta_update_`. All adapters have one dtype.
        positions: the places of the weights in their list, on which the random bits depend; None
            for 0, 1, ...
        first_rows: the numbers of their first rows, of which they depend too; None for 0. A weight
            may be some rows of a larger one.
    """

    def __init__(
        self, weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed,
        positions=None, first_rows=None,
    ):  # fmt: skip
        w, a, low = weights[0], lora_As[0], (remainders or weights)[0]
        self.device, self.seed, self.rows = w.device, seed, len(weights)
        matrices = list(
            zip(weights, lora_As, lora_Bs, delta_As, delta_Bs, remainders or weights, strict=True)
        )
        dtypes = [triton_dtype(t.dtype) for t in (w, a, low)]
        rank = 2 * max(a.shape[0] for a in lora_As)
        self.options = DELTA_UPDATE.choose(
            self.device,
            (gpu.capability(self.device), rounding, rank, w.element_size()),
            (rank, w.element_size(), rounding),
        )
        names = ("BLOCK_SIZE_N", "BLOCK_SIZE_K", "TILES", "num_stages")
        block_n, block_k, tiles, stages = (self.options.pop(name) for name in names)
        self.strip = block_n, block_k * tiles
        all_dense = all(_is_dense(*ts) for ts in matrices)
        blocks = triton.cdiv(rank, RANK_BLOCK.value)
        precision = product_precision(rounding in ("nearest", "stochastic"), self.device)
        self.constants = (
            all_dense, rounding, *dtypes, precision,
            block_n, block_k, tiles, blocks if blocks <= MAX_KEPT_BLOCKS else 0, stages,
        )  # fmt: skip
        self.key = *self.constants, *self.options.values()
        positions = range(self.rows) if positions is None else positions
        first_rows = [0] * self.rows if first_rows is None else first_rows
        firsts, rows, self.strips = [], [], 0
        for position, first, ts in zip(positions, first_rows, matrices, strict=True):
            w, a = ts[:2]
            firsts.append(self.strips)
            rows.append([
                *(t.data_ptr() for t in ts), *(s for t in ts for s in t.stride()),
                *w.shape, a.shape[0], 0, position, _is_dense(*ts), first,
            ])  # fmt: skip
            self.strips += math.prod(map(triton.cdiv, w.shape, self.strip))
        self._firsts, self._rows = firsts, rows
        self.table = new_numbers(self._numbers(scales), torch.int64, self.device)

    def rescale(self, scales: list[float]) -> None:
        """Set other scales. A captured graph reads them at its next replay."""
        copy_async(torch.tensor(self._numbers(scales), dtype=torch.int64), self.table)

    def _numbers(self, scales) -> tuple[int, ...]:
        for row, scale in zip(self._rows, scales, strict=True):
            row[SCALE.value] = _float_bits(scale)
        return (*self._firsts, *(number for row in self._rows for number in row))

    def __call__(self, step: torch.Tensor, apply: torch.Tensor | None) -> None:
        """Update the weights, unless ``apply`` is 0.

        Both arguments are 0-dim tensors on the device; ``step`` is int64, ``apply`` may be None.
        """
        key = (
            *self.key, step.data_ptr() % 16,
            apply is None or (apply.dtype, apply.data_ptr() % 16),
        )  # fmt: skip
        with gpu.on_device(self.device):
            launch_cached(
                _delta_update_kernel, (self.strips,), key,
                self.table, self.rows, self.seed, step, apply, *self.constants,
                **self.options, num_stages=1,  # for the loops that do not have STAGES
            )  # fmt: skip


_prepared = LaunchCache()


def delta_update_(
    weights, lora_As, lora_Bs, delta_As, delta_Bs, scales, rounding, remainders, seed, step, apply,
    key=None,
):  # fmt: skip
    """Update every weight in place; `deltadiff.delta_update_` describes the arguments.

    ``key`` is a fingerprint of all arguments but ``step`` and ``apply``: the launches for a key are
    prepared once. None prepares them anew.
    """
    if apply is not None and apply.dtype == torch.bool:
        apply = apply.view(torch.int8)

    def prepare() -> list[DeltaUpdate]:
        """One launch for each dtype of adapters; usually there is only one."""
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
    """Whether all rows are without gaps, and those of K elements can load 16 bytes at a time."""
    return w.shape[1] % 8 == 0 and all(
        t.stride(1) == 1
        and t.stride(0) < 2**24
        and (short or (t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0))
        for t, short in ((w, 0), (a, 0), (b, 1), (delta_a, 0), (delta_b, 1), (low, 0))
    )


def _float_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]
