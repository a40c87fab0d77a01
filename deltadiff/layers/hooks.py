"""What is attached to one module and happens only when that module is called."""

from collections.abc import Callable, Iterator

from torch import nn

# Where PyTorch keeps what happens when a module is called and happens nowhere else.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> Iterator[object]:
    """All hooks on a module itself."""
    for hooks in HOOKS:
        yield from getattr(module, hooks).values()


def has_hooks(
    module: nn.Module, apart_from: Callable[[nn.Module, object], bool] = lambda *_: False
) -> bool:
    """Whether something happens when the module is called that happens nowhere else.

    ``apart_from``: tells of a module and a hook whether that does not count.
    """
    # accelerate's hooks are a forward pass of the instance.
    others = (hook for hook in hooks_of(module) if not apart_from(module, hook))
    return "forward" in vars(module) or next(others, None) is not None
