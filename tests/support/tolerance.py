"""The rule that the tests hold the results of operations to."""

import torch
from torch import Tensor


def assert_close_to_truth(
    found: Tensor,
    eager: Tensor,
    truth: Tensor,
    factor: float,
    dtype: torch.dtype | None = None,
) -> None:
    """The measured tolerance: ``factor`` times the error of eager PyTorch, and one rounding."""
    assert found.shape == truth.shape
    ours, theirs = relative_error(found, truth), relative_error(eager, truth)
    limit = factor * theirs + torch.finfo(dtype or found.dtype).eps / 2
    assert ours <= limit, f"error {ours:.2e}, eager {theirs:.2e}, limit {limit:.2e}"


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth (which is not zero)."""
    found, truth = found.detach().double(), truth.detach()
    assert found.shape == truth.shape and truth.dtype == torch.float64
    return ((found - truth).norm() / truth.norm()).item()
