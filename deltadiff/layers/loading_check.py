"""A swapped model's state is checked as a whole before any of it is loaded.

torch loads one module after the other, so a layer that refuses what a state says of its update
comes too late for the modules before it. `swap_` gives the model a hook that asks all layers first;
`unswap_` and `merge_` take it away. A layer that is loaded by itself still checks its own part.
"""

from typing import Any

from torch import nn

from .lora_layers import HoldsPairs
from .plain_names import unwrapped

_HOOK = "_deltadiff_loading_check"


def watch_loading(model: nn.Module) -> None:
    """Let `load_state_dict` of the model ask all layers first; once for each model."""
    model = unwrapped(model)
    if _HOOK not in model.__dict__:
        model.__dict__[_HOOK] = model.register_load_state_dict_pre_hook(_check_all)


def unwatch_loading(model: nn.Module) -> None:
    """Take the hook away, wherever `watch_loading` gave it in this model."""
    for module in model.modules():
        hook = module.__dict__.pop(_HOOK, None)
        if hook is not None:
            hook.remove()


def _check_all(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, HoldsPairs):
            module.check_state(state, f"{name}." if name else "")
