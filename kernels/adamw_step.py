"""AdamW for many tensors in one launch, which also yields p' - p for Delta-LoRA's update.

A program owns one block of one tensor. A table on the device (`runtime/multi_tensor.py`) says where
the blocks of each tensor start, and holds its addresses. Everything that changes from step to step
is on the device too: the addresses of the gradients, the options, the step counts, the gradient
scale and found_inf.
"""

import math

import torch
import triton
import triton.language as tl

from .runtime.async_copy import copy_async
from .runtime.cached_launch import launch_cached
from .runtime.dtypes import triton_dtype
from .runtime.gpu import on_device
from .runtime.launch_cache import LaunchCache
from .runtime.multi_tensor import device_numbers, find_row

# A row of the table: the addresses of p, m, v, delta, anchor and copy, 0 for none; the number of
# elements; the position in ``grads``, ``steps`` and ``moved``.
P, EXP_AVG, EXP_AVG_SQ, DELTA, ANCHOR, COPY, NUMEL, INDEX, COLUMNS = (
    tl.constexpr(i) for i in range(9)
)


# The entries of the options, a float64 vector on the device.
BETA1, BETA2, LOG2_BETA1, LOG2_BETA2, EPS, WEIGHT_DECAY, LR, OPTIONS = (
    tl.constexpr(i) for i in range(8)
)


@triton.jit
def _vector(row, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    """The pointer to one of a row's vectors."""
    pointer = tl.load(row + which).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


_POINTERS = (
    "table_ptr", "grads_ptr", "steps_ptr", "lr_ptr", "options_ptr", "anchor_now_ptr",
    "grad_scale_ptr", "found_inf_ptr", "moved_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=_POINTERS)
def _adamw_step_kernel(
    table_ptr, n, grads_ptr, steps_ptr, lr_ptr, options_ptr,
    anchor_now_ptr, grad_scale_ptr, found_inf_ptr, moved_ptr,
    aligned: tl.constexpr, p_dtype: tl.constexpr, moment_dtype: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Do one step for a block of a tensor.

    With found_inf or without a gradient, nothing but delta changes, which is 0 then.
    """
    block = tl.program_id(0)
    i = find_row(table_ptr, n, block)
    block -= tl.load(table_ptr + i).to(tl.int32)
    row = table_ptr + n + i * COLUMNS
    index = tl.load(row + INDEX)
    numel = tl.load(row + NUMEL)
    if aligned:
        numel = tl.multiple_of(numel, 8)
    offs = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < numel
    mask_delta = mask & (tl.load(row + DELTA) != 0)
    delta_ptrs = _vector(row, DELTA, tl.float32, aligned) + offs
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            tl.store(delta_ptrs, tl.zeros((BLOCK_SIZE,), tl.float32), mask=mask_delta)
            return

    p_ptrs = _vector(row, P, p_dtype, aligned) + offs
    old = tl.load(p_ptrs, mask=mask, other=0.0)
    if anchor_now_ptr is not None:
        anchored = (tl.load(row + ANCHOR) != 0) & (tl.load(anchor_now_ptr) != 0)
        tl.store(_vector(row, ANCHOR, p_dtype, aligned) + offs, old, mask=mask & anchored)
    mask_copy = mask & (tl.load(row + COPY) != 0)
    copy_ptrs = _vector(row, COPY, p_dtype, aligned) + offs
    if moved_ptr is not None:
        known = tl.load(copy_ptrs, mask=mask_copy, other=0.0)
        differs = mask_copy & (old != known) & (old == old)
        # All programs that find a difference store the same number.
        tl.store(moved_ptr + index, 1, mask=tl.max(differs.to(tl.int32), 0) != 0)
    grad = tl.load(grads_ptr + index)
    if grad == 0:
        tl.store(delta_ptrs, tl.zeros((BLOCK_SIZE,), tl.float32), mask=mask_delta)
        return

    m_ptrs = _vector(row, EXP_AVG, moment_dtype, aligned) + offs
    v_ptrs = _vector(row, EXP_AVG_SQ, moment_dtype, aligned) + offs
    g_ptr = grad.to(tl.pointer_type(p_dtype))
    if aligned:
        g_ptr = tl.multiple_of(g_ptr, 16)
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    p = old.to(tl.float32)

    # float64, so that 1 - beta^t loses no digits if t = 1 and beta is close to 1
    lr = tl.load(lr_ptr).to(tl.float64)
    beta1, beta2 = tl.load(options_ptr + BETA1), tl.load(options_ptr + BETA2)
    t = (tl.load(steps_ptr + index) + 1).to(tl.float64)
    correction1 = 1.0 - tl.exp2(t * tl.load(options_ptr + LOG2_BETA1))
    correction2 = (1.0 - tl.exp2(t * tl.load(options_ptr + LOG2_BETA2))).to(tl.float32)
    step_size = (lr / correction1).to(tl.float32)
    decay = (1.0 - lr * tl.load(options_ptr + WEIGHT_DECAY)).to(tl.float32)
    eps = tl.load(options_ptr + EPS).to(tl.float32)
    m = beta1.to(tl.float32) * m + (1.0 - beta1).to(tl.float32) * g
    v = beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * g * g
    denominator = tl.sqrt_rn(tl.div_rn(v, correction2)) + eps
    new = (p * decay - tl.div_rn(step_size * m, denominator)).to(p_dtype)

    tl.store(p_ptrs, new, mask=mask)
    tl.store(m_ptrs, m.to(moment_dtype), mask=mask)
    tl.store(v_ptrs, v.to(moment_dtype), mask=mask)
    tl.store(delta_ptrs, new.to(tl.float32) - p, mask=mask_delta)
    tl.store(copy_ptrs, new, mask=mask_copy)


BLOCK_SIZE = 1024


class AdamWStep:
    """The prepared step of tensors whose addresses do not change.

    Args:
        params, exp_avgs, exp_avg_sqs, deltas, anchors, copies: as for `deltadiff.adamw_step_`. All
            moments have one dtype.
        positions: the places of the tensors in ``grads``, ``steps`` and ``moved``; None for 0, 1,
            ...

    Raises:
        ValueError: a tensor is not contiguous.
    """

    def __init__(self, params, exp_avgs, exp_avg_sqs, deltas, anchors, copies, positions=None):
        self.device, self.aligned = params[0].device, True
        self.dtypes = triton_dtype(params[0].dtype), triton_dtype(exp_avgs[0].dtype)
        self.rows, self.blocks = len(params), 0
        positions = range(len(params)) if positions is None else positions
        rows, first_blocks = [], []
        vectors = zip(params, exp_avgs, exp_avg_sqs, deltas, anchors, copies, strict=True)
        for position, ts in zip(positions, vectors, strict=True):
            if not all(t is None or t.is_contiguous() for t in ts):
                raise ValueError("adamw_step_: got a tensor that is not contiguous")
            pointers = [0 if t is None else t.data_ptr() for t in ts]
            numel = ts[0].numel()
            self.aligned &= numel % 8 == 0 and not any(pointer % 16 for pointer in pointers)
            first_blocks.append(self.blocks)
            rows.append((*pointers, numel, position))
            self.blocks += triton.cdiv(numel, BLOCK_SIZE)
        numbers = (*first_blocks, *(number for row in rows for number in row))
        self.table = device_numbers(numbers, torch.int64, self.device)
        self.options = torch.empty(OPTIONS.value, dtype=torch.float64, device=self.device)

    def set_options(self, lr, beta1, beta2, eps, weight_decay) -> None:
        """Set the options. A captured graph reads them at its next replay.

        ``lr`` may be a tensor: one number on the device, float32 or float64, which every step reads
        anew.
        """
        given = isinstance(lr, torch.Tensor)
        logs = [math.log2(beta) if beta else -math.inf for beta in (beta1, beta2)]
        numbers = beta1, beta2, *logs, eps, weight_decay, 0.0 if given else lr
        copy_async(torch.tensor(numbers, dtype=torch.float64), self.options)
        self.lr = lr if given else self.options[LR.value :]

    def __call__(self, grads, aligned, steps, anchor_now, grad_scale, found_inf, moved) -> None:
        """Do one step, with the options that were set last.

        Args:
            grads: int64, the addresses of the gradients, 0 for none. Each gradient is contiguous
                and has the dtype of its parameter.
            aligned: whether these addresses are multiples of 16.
            steps: float32, the number of steps done, which is not changed.
            anchor_now, grad_scale, found_inf: one number each on the device, or None.
            moved: int32, as for `deltadiff.adamw_step_`, or None.
        """
        if not self.blocks:
            return
        aligned = aligned and self.aligned
        key = (
            aligned, self.dtypes, self.lr.dtype, anchor_now is None or anchor_now.dtype,
            grad_scale is None, found_inf is None, moved is None,
        )  # fmt: skip
        with on_device(self.device):
            launch_cached(
                _adamw_step_kernel, (self.blocks,), key,
                self.table, self.rows, grads, steps, self.lr, self.options,
                anchor_now, grad_scale, found_inf, moved, aligned, *self.dtypes, BLOCK_SIZE,
                num_warps=8,
                enable_fp_fusion=False,  # otherwise ``aligned`` decides which products fuse
            )  # fmt: skip


_prepared = LaunchCache()


def adamw_step_(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay,
    deltas, anchors, anchor_now, grad_scale, found_inf, copies, moved, key=None,
):  # fmt: skip
    """Do one step in place for every tensor that has a gradient; ``steps`` are not changed.

    `deltadiff.adamw_step_` describes the arguments. ``key`` is a fingerprint of all tensors but the
    gradients: the launches for a key are prepared once. None prepares them anew.

    Raises:
        ValueError: a tensor other than a gradient is not contiguous. Nothing was changed.
    """
    if anchor_now is not None and anchor_now.dtype == torch.bool:
        anchor_now = anchor_now.view(torch.int8)
    grads = [None if g is None else g.contiguous() for g in grads]
    addresses = tuple(0 if g is None else g.data_ptr() for g in grads)
    aligned = not any(address % 16 for address in addresses)
    column = device_numbers(addresses, torch.int64, steps.device)

    def prepare() -> list[AdamWStep]:
        """One launch for each dtype of moments; usually there is only one."""
        found, tensors = [], (params, exp_avgs, exp_avg_sqs, deltas, anchors, copies)
        for dtype in dict.fromkeys(m.dtype for m in exp_avgs):
            mine = [i for i, m in enumerate(exp_avgs) if m.dtype == dtype]
            found.append(AdamWStep(*([ts[i] for i in mine] for ts in tensors), mine))
        return found

    for step in _prepared.get(key, prepare):
        step.set_options(lr, beta1, beta2, eps, weight_decay)
        step(column, aligned, steps, anchor_now, grad_scale, found_inf, moved)
