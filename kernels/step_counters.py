"""The end of an optimizer step: one launch advances everything that is counted on the device.

The counts are on the device because only the device knows whether a step was skipped, and because a
step that is replayed from a CUDA graph runs no code on the host.
"""

import triton
import triton.language as tl

from .runtime.cached_launch import launch_cached
from .runtime.gpu import on_device

_POINTERS = (
    "iteration_ptr", "steps_ptr", "grads_ptr", "firsts_ptr", "flags_ptr", "rank_scales_ptr",
    "new_scales_ptr", "new_from_ptr", "found_inf_ptr",
)  # fmt: skip


@triton.jit(
    do_not_specialize=["n_steps", "n_flags", "n_scales"], do_not_specialize_on_alignment=_POINTERS
)
def _advance_counters_kernel(
    iteration_ptr, steps_ptr, grads_ptr, n_steps, firsts_ptr, flags_ptr, n_flags,
    rank_scales_ptr, new_scales_ptr, new_from_ptr, n_scales, found_inf_ptr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Advance the counts; set the flags of what begins in this iteration, and the rank scales."""
    iteration = tl.load(iteration_ptr)
    done = 1
    if found_inf_ptr is not None:
        done = (tl.load(found_inf_ptr) == 0).to(tl.int32)
    iteration += done
    for start in range(0, n_steps, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        mask = offs < n_steps
        used = (tl.load(grads_ptr + offs, mask=mask, other=0) != 0).to(tl.int32)
        steps = tl.load(steps_ptr + offs, mask=mask, other=0.0)
        tl.store(steps_ptr + offs, steps + (done * used).to(tl.float32), mask=mask)
    for start in range(0, n_flags, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        mask = offs < n_flags
        first = tl.load(firsts_ptr + offs, mask=mask, other=0)
        tl.store(flags_ptr + 2 * offs, (iteration >= first).to(tl.int32), mask=mask)
        tl.store(flags_ptr + 2 * offs + 1, (iteration == first).to(tl.int32), mask=mask)
    for start in range(0, n_scales, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        mask = offs < n_scales
        mask &= iteration >= tl.load(new_from_ptr + offs, mask=mask, other=0)
        new = tl.load(new_scales_ptr + offs, mask=mask, other=0.0)
        tl.store(rank_scales_ptr + offs, new, mask=mask)
    tl.debug_barrier()  # wait until every thread has read the old count
    tl.store(iteration_ptr, iteration)


def advance_counters_(
    iteration, steps, grads, firsts, flags, rank_scales, new_scales, new_from, found_inf
) -> None:
    """Count one optimizer step as done, unless ``found_inf`` is set.

    From iteration ``new_from`` on, ``rank_scales`` (1 + lambda of Delta-LoRA) are ``new_scales``.
    `deltadiff.ops.reference.advance_counters_ref_` describes the arguments.
    """
    with on_device(iteration.device):
        launch_cached(
            _advance_counters_kernel, (1,), (rank_scales.dtype, found_inf is None),
            iteration, steps, grads, steps.numel(), firsts, flags, firsts.numel(),
            rank_scales, new_scales, new_from, rank_scales.numel(), found_inf, 1024, num_warps=4,
        )  # fmt: skip
