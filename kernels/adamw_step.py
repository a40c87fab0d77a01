"""AdamW for many tensors in one launch, which also yields p' - p for Delta-LoRA's update.

A program owns one block of one tensor. Where the blocks of each tensor start, and its pointers,
stand in a table on the device; gradient scale, found_inf and step counts are read there too.
"""

import math

import torch
import triton
import triton.language as tl

from .tables import TRITON_DTYPES, device_table, find_row, on_device

# A row of the table: pointers of p, g, m, v, delta and anchor (0: none), the number of elements,
# and the position in ``steps``.
P, GRAD, EXP_AVG, EXP_AVG_SQ, DELTA, ANCHOR, NUMEL, INDEX, COLUMNS = (
    tl.constexpr(i) for i in range(9)
)


@triton.jit
def _vector(row, which: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(row + which).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit(do_not_specialize=["n"])
def _adamw_step_kernel(
    table_ptr, n, steps_ptr, anchor_now_ptr, grad_scale_ptr, found_inf_ptr,
    lr: tl.float64, log2_beta1: tl.float64, log2_beta2: tl.float64,
    beta1, beta2, one_minus_beta1, one_minus_beta2, eps, decay,
    aligned: tl.constexpr, p_dtype: tl.constexpr, moment_dtype: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    i = find_row(table_ptr, n, block)
    block -= tl.load(table_ptr + i).to(tl.int32)
    row = table_ptr + n + i * COLUMNS
    numel = tl.load(row + NUMEL)
    if aligned:
        numel = tl.multiple_of(numel, 8)
    offs = block.to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offs < numel
    delta = tl.load(row + DELTA)
    delta_ptrs = _vector(row, DELTA, tl.float32, aligned) + offs
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0:
            tl.store(delta_ptrs, tl.zeros((BLOCK_SIZE,), tl.float32), mask=mask & (delta != 0))
            return

    p_ptrs = _vector(row, P, p_dtype, aligned) + offs
    m_ptrs = _vector(row, EXP_AVG, moment_dtype, aligned) + offs
    v_ptrs = _vector(row, EXP_AVG_SQ, moment_dtype, aligned) + offs
    old = tl.load(p_ptrs, mask=mask, other=0.0)
    g = tl.load(_vector(row, GRAD, p_dtype, aligned) + offs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    if grad_scale_ptr is not None:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    p = old.to(tl.float32)

    # 1 - beta^t loses no digits in float64, where t = 1 and beta is close to 1.
    t = (tl.load(steps_ptr + tl.load(row + INDEX)) + 1).to(tl.float64)
    correction1 = 1.0 - tl.exp2(t * log2_beta1)
    correction2 = (1.0 - tl.exp2(t * log2_beta2)).to(tl.float32)
    step_size = (lr / correction1).to(tl.float32)
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    denominator = tl.sqrt_rn(tl.div_rn(v, correction2)) + eps
    new = (p * decay - tl.div_rn(step_size * m, denominator)).to(p_dtype)

    tl.store(p_ptrs, new, mask=mask)
    tl.store(m_ptrs, m.to(moment_dtype), mask=mask)
    tl.store(v_ptrs, v.to(moment_dtype), mask=mask)
    tl.store(delta_ptrs, new.to(tl.float32) - p, mask=mask & (delta != 0))
    if anchor_now_ptr is not None:
        anchored = (tl.load(row + ANCHOR) != 0) & (tl.load(anchor_now_ptr) != 0)
        tl.store(_vector(row, ANCHOR, p_dtype, aligned) + offs, old, mask=mask & anchored)


BLOCK_SIZE = 1024


def adamw_step_(
    params, grads, exp_avgs, exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay,
    deltas, anchors, anchor_now, grad_scale, found_inf,
):  # fmt: skip
    """One step for every tensor, in place; see `deltadiff.adamw_step_` for the arguments.

    Raises:
        ValueError: a tensor other than a gradient is not contiguous. Nothing was changed.
    """
    for name, ts in (
        ("params", params),
        ("exp_avgs", exp_avgs),
        ("exp_avg_sqs", exp_avg_sqs),
        ("deltas", deltas),
        ("anchors", anchors),
    ):
        if not all(t is None or t.is_contiguous() for t in ts):
            raise ValueError(f"{name}: got a tensor that is not contiguous; accepted: contiguous")
    if anchor_now is not None and anchor_now.dtype == torch.bool:
        anchor_now = anchor_now.view(torch.int8)
    grads = [g.contiguous() for g in grads]
    vectors = list(zip(params, grads, exp_avgs, exp_avg_sqs, deltas, anchors, strict=True))
    with on_device(steps.device):
        # One launch for each dtype of moments, so usually one.
        for moment_dtype in dict.fromkeys(m.dtype for m in exp_avgs):
            rows, first_blocks, blocks, aligned = [], [], 0, True
            for index, ts in enumerate(vectors):
                if ts[2].dtype != moment_dtype:
                    continue
                pointers = [0 if t is None else t.data_ptr() for t in ts]
                numel = ts[0].numel()
                aligned &= numel % 8 == 0 and not any(pointer % 16 for pointer in pointers)
                first_blocks.append(blocks)
                rows.append((*pointers, numel, index))
                blocks += triton.cdiv(numel, BLOCK_SIZE)
            if blocks:
                _adamw_step_kernel[(blocks,)](
                    device_table(rows, first_blocks, steps.device), len(rows),
                    steps, anchor_now, grad_scale, found_inf,
                    lr, _log2(beta1), _log2(beta2), beta1, beta2, 1 - beta1, 1 - beta2, eps,
                    1 - lr * weight_decay, aligned,
                    TRITON_DTYPES[params[0].dtype], TRITON_DTYPES[moment_dtype],
                    BLOCK_SIZE=BLOCK_SIZE, num_warps=8,
                    enable_fp_fusion=False,  # which products fuse would depend on ``aligned``
                )  # fmt: skip
        steps.add_(1 if found_inf is None else (found_inf.reshape(()) == 0))


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf
