"""Whether activation checkpointing is running a forward pass again, for what that keeps.

Such a pass ends as soon as everything was kept that the first one kept. So an operation should keep
what it keeps before it computes a result that nothing else may need.
"""

import torch

_HOOK = "_recomputation_hook.__init__.<locals>.pack_hook"
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_recomputing() -> bool:
    """Whether `torch.utils.checkpoint` (not its reentrant form) repeats a forward pass now.

    Where a version of PyTorch does not tell, the answer is no.
    """
    hooks = None if _top_hooks is None else _top_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "") == _HOOK
