"""The operations of an optimizer step, prepared once for tensors that stay where they are.

Unlike those of `ops` they check nothing, and what changes from step to step (options, counts, the
addresses of gradients) they read from the device, where the backend can.
"""

import contextlib

import torch
from torch import Tensor

from . import reference

with contextlib.suppress(ImportError):  # without Triton, `choose_path` never names it
    from ..kernels.adamw_step import AdamWStep
    from ..kernels.delta_update import DeltaUpdate
    from ..kernels.step_counters import advance_counters_


class _AdamWList:
    """`kernels.adamw_step.AdamWStep` for the backends that take lists of tensors."""

    def __init__(self, backend, params, *state):
        self.backend, self.params, self.state = backend, params, state
        self.numbers = None

    def set_options(self, lr, *options) -> None:
        if not self.params[0].is_cuda:
            self.lr, self.options = lr, options
            return
        numbers = 0.0 if isinstance(lr, Tensor) else lr, *options
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.numbers is None:
            self.numbers = values.to(self.params[0].device)  # in place from now on: see AdamWStep
        else:
            self.numbers.copy_(values.pin_memory(), non_blocking=True)
        own_lr, *self.options = self.numbers.unbind()
        self.lr = lr if isinstance(lr, Tensor) else own_lr

    def __call__(self, grads, aligned, steps, anchor_now, grad_scale, found_inf) -> None:
        lr = self.lr.item() if isinstance(self.lr, Tensor) and not self.lr.is_cuda else self.lr
        exp_avgs, exp_avg_sqs, deltas, anchors = self.state
        step = reference.adamw_step_list_ref_
        if self.backend == "cpp":
            step = torch.ops.deltadiff.adamw_step_
        step(
            self.params, [p.grad for p in self.params], exp_avgs, exp_avg_sqs, steps,
            lr, *self.options, deltas, anchors, anchor_now, grad_scale, found_inf,
        )  # fmt: skip


def prepare_adamw_step(backend: str, params, exp_avgs, exp_avg_sqs, deltas, anchors):
    """`adamw_step_` of tensors that stay where they are; see `kernels.adamw_step.AdamWStep`."""
    state = exp_avgs, exp_avg_sqs, deltas, anchors
    if backend == "triton":
        return AdamWStep(params, *state)
    return _AdamWList(backend, params, *state)


class _DeltaUpdateList:
    """`kernels.delta_update.DeltaUpdate` for the backends that take lists of tensors."""

    def __init__(self, backend, *lists_and_scales):
        self.backend = backend
        *self.lists, self.scales, self.rounding, self.remainders, self.seed = lists_and_scales

    def rescale(self, scales: list[float]) -> None:
        self.scales = scales

    def __call__(self, step, apply) -> None:
        run = reference.delta_update_list_ref_
        if self.backend == "cpp":
            run = torch.ops.deltadiff.delta_update_
        run(*self.lists, self.scales, self.rounding, self.remainders, self.seed, step, apply)


def prepare_delta_update(backend: str, *args):
    """`delta_update_` of weights that stay where they are; see `kernels.delta_update.DeltaUpdate`.

    The adapters are of one dtype.
    """
    if backend == "triton":
        return DeltaUpdate(*args)
    return _DeltaUpdateList(backend, *args)


def run_advance(backend: str, *args) -> None:
    """The end of an optimizer step: what it counts; see `reference.advance_ref_`."""
    run = advance_counters_ if backend == "triton" else reference.advance_ref_
    run(*args)
