"""`LeanForward`: what stands in the place of a module's forward pass, and when it steps aside."""

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ...ops.transforms import transformed
from ..hooks import has_hooks


class LeanForward(ABC):
    """A forward pass that gives what the module's own does, and keeps less.

    It is an attribute of the instance, ``module.forward``, so that the module keeps its class, its
    place and its state. Where it does not apply, the module's own forward pass runs. Where that is
    because someone changed a part of the block, a warning says so.
    """

    what: str  # what the module is, in words

    def __init__(self, module: nn.Module):
        self.module = module
        self.own = vars(module).get("forward")  # Liger's patch of an instance, for example

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler itself decides what is made again
            return self.run_own(*args, **kwargs)
        plain = len(args) == 1 and not kwargs and type(args[0]) in (Tensor, nn.Parameter)
        if not plain or not torch.is_grad_enabled() or transformed():
            return self.run_own(*args, **kwargs)
        changed = self.why_changed()
        if changed is not None:
            warnings.warn(
                f"a lean {self.what} runs as it did before `swap_`, and keeps more memory: "
                f"{changed}; take that back, or call `swap_(model)` for a report",
                stacklevel=2,
            )
            return self.run_own(*args, **kwargs)
        result = self.run_lean(args[0])
        return self.run_own(*args, **kwargs) if result is None else result

    def run_own(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass that the module had before."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @abstractmethod
    def run_lean(self, x: Tensor) -> Tensor | None:
        """The result of the forward pass; None where the module's own is to give it."""

    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """The modules that the lean forward pass does not call, and computes itself."""

    def why_changed(self) -> str | None:
        """What someone did to a part of the block since it was made lean, in words."""
        if _has_any_global_hook():
            return "there are hooks on all modules"
        if any(map(has_hooks, self.parts())):
            return "there are hooks on the modules inside of it"
        return None


def lean_forward(module: nn.Module) -> LeanForward | None:
    """The lean forward pass of a module; None if it has none."""
    found = vars(module).get("forward")
    return found if isinstance(found, LeanForward) else None
