"""`LeanRmsNorm`: an RMSNorm whose readers keep its input instead of its output."""

from typing import Any

from torch import Tensor, nn

from ...checks import DTYPES
from ...ops.rms_norm import rms_norm
from .known_forwards import rms_norm_form
from .lean_forward import LeanForward


class LeanRmsNorm(LeanForward):
    """An RMSNorm by `rms_norm`, which keeps its input, and tells its readers how to use that."""

    what = "RMSNorm"

    def __init__(self, module: nn.Module):
        form = rms_norm_form(module)
        assert form is not None  # who makes a norm lean knows it by its form
        super().__init__(module)
        self.form = form

    def parts(self) -> list[nn.Module]:
        return []

    def run_lean(self, x: Tensor) -> Tensor | None:
        weight: Any = getattr(self.module, "weight", None)
        if why_not_weight(weight) is not None or weight.dtype != x.dtype:
            return None
        if x.device != weight.device or x.shape[-1:] != weight.shape or x.dtype not in DTYPES:
            return None
        form = self.form
        casting, offset = form.casting, form.offset
        if casting.startswith("."):
            casting = getattr(self.module, casting[1:])
        if casting not in ("llama", "gemma"):
            return None
        if isinstance(offset, str):
            offset = float(getattr(self.module, offset))
        eps = getattr(self.module, form.eps)
        return rms_norm(x, weight, eps, offset, rounds_twice=casting == "llama")


def why_not_weight(weight: object) -> str | None:
    """None for the weight of a norm that can be made lean, else the reason in words."""
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return "its weight is no whole tensor"
    return "its weight is trained" if weight.requires_grad else None
