"""The end of an optimizer step: its counters, and what follows from them, in one launch."""

import contextlib

from torch import Tensor

from . import reference

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels.step_counters import advance_counters_


def run_advance(
    backend: str,
    iteration: Tensor,
    steps: Tensor,
    grads: Tensor,
    firsts: Tensor,
    flags: Tensor,
    rank_scales: Tensor,
    new_scales: Tensor,
    changes: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Count one optimizer step, in place; `reference.advance_ref_` describes the arguments.

    It checks nothing, and ``backend`` must be there.
    """
    run = advance_counters_ if backend == "triton" else reference.advance_ref_
    run(iteration, steps, grads, firsts, flags, rank_scales, new_scales, changes, found_inf)
