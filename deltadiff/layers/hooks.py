"""What is attached to one module and happens only when that module is called."""

from torch import nn

# Where PyTorch keeps what happens when a module is called and happens nowhere else.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether something happens when the module is called that happens nowhere else."""
    # accelerate's hooks are a forward pass of the instance.
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS)
