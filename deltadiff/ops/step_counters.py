"""The end of an optimizer step: its counters, and what follows from them, in one launch."""

import contextlib

from torch import Tensor

from . import reference

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels.step_counters import advance_counters_


def advance_counters(
    backend: str,
    iteration: Tensor,
    steps: Tensor,
    grads: Tensor,
    firsts: Tensor,
    flags: Tensor,
    rank_scales: Tensor,
    new_scales: Tensor,
    new_from: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Count one optimizer step, in place; see `reference.advance_counters_ref_`.

    It checks nothing, and ``backend`` must be there.
    """
    run = advance_counters_ if backend == "triton" else reference.advance_counters_ref_
    run(iteration, steps, grads, firsts, flags, rank_scales, new_scales, new_from, found_inf)
