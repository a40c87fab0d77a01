"""Names of modules and tensors as they are in the plain model, whatever is wrapped around it.

DistributedDataParallel and DataParallel put "module." before every name, torch.compile "_orig_mod."
and PEFT "base_model.model."; checkpoint wrappers and FSDP put a part of their own into it. Files
hold the plain names, so that they fit the model under any wrapper.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from ..errors import ArgumentError
from .linear import is_conv1d

T = TypeVar("T")

_WRAPPED = ("module", "_orig_mod")  # what wrappers call the one module that they hold
# What wrappers that may stand around any module call the one inside of them.
INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """The name of a module or tensor without what wrappers add to it; empty for the model."""
    parts = [part for part in name.split(".") if part not in INNER]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        del parts[: 1 if parts[0] == "module" else 2]
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", ".".join(parts))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of all wrappers that hold nothing else."""
    while len(model._modules) == 1 and not model._parameters:
        ((name, inner),) = model._modules.items()
        if name not in _WRAPPED or inner is None:
            break
        model = inner
    return model


def by_plain_name(named: Iterable[tuple[str, T]]) -> dict[str, T]:
    """Things by their plain names.

    Raises:
        ArgumentError: two of them have the same plain name.
    """
    found: dict[str, T] = {}
    for name, thing in named:
        if found.setdefault(plain_name(name), thing) is not thing:
            raise _clash(plain_name(name))
    return found


class Held(NamedTuple):
    """A parameter or a persistent buffer of a model.

    Attributes:
        owner: the module that holds it.
        tensor: as it is stored.
        logical: in the layout that all bases share: (out, in), where a `Conv1D` stores (in, out).
    """

    owner: nn.Module
    tensor: Tensor
    logical: Tensor


def held_tensors(model: nn.Module) -> dict[str, Held]:
    """The parameters and persistent buffers by plain name; a tied one under each of its names.

    Raises:
        ArgumentError: two of them have the same plain name.
    """
    found: dict[str, Held] = {}
    for prefix, module in model.named_modules():
        lasting = [n for n in module._buffers if n not in module._non_persistent_buffers_set]
        tensors = {**module._parameters, **{name: module._buffers[name] for name in lasting}}
        for name, t in tensors.items():
            if t is not None:
                turned = name == "weight" and _stores_in_out(module)
                plain = plain_name(f"{prefix}.{name}".removeprefix("."))
                held = found.setdefault(plain, Held(module, t, t.T if turned else t))
                if held.tensor is not t:
                    raise _clash(plain)
    return found


def _stores_in_out(module: nn.Module) -> bool:
    """Whether this is a `Conv1D`, or the layer that `swap_` put in its place."""
    swapped = isinstance(module, nn.Linear) and getattr(module, "transposed", False)
    return is_conv1d(module) or swapped


def _clash(name: str) -> ArgumentError:
    given = f"two things that are called {name!r} without the names of wrappers"
    return ArgumentError("model", given, "names that stay different")


def rename_to_fit(model: nn.Module, names: Iterable[str], here: Iterable[str]) -> tuple[str, str]:
    """The prefix that the names of a file lose, and the one that they get, to fit a model.

    transformers puts an encoder into models with heads under ``base_model_prefix``. So the layers
    of a classifier are called "bert.encoder..." there, and "encoder..." in the encoder alone.

    Args:
        names: plain names of layers in the file.
        here: plain names of the linear layers of ``model``.
    """
    names, here = list(names), set(here)
    prefixes = ((m, getattr(type(m), "base_model_prefix", "")) for m in model.modules())
    inner, prefix = next(((m, prefix) for m, prefix in prefixes if prefix), (model, ""))
    if not prefix or all(name in here for name in names):
        return "", ""
    if prefix not in inner._modules:
        return (f"{prefix}.", "") if all(n.startswith(f"{prefix}.") for n in names) else ("", "")
    return ("", "") if any(name in here for name in names) else ("", f"{prefix}.")
