"""`choose_modules`: the modules of a model that ``target_modules`` names."""

import difflib
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError
from .linear import is_conv1d, is_peft
from .lora_linear import LoraLinear

if TYPE_CHECKING:
    from .linear import LinearLayer

Targets = str | Collection[str] | Callable[[str, nn.Module], bool]


def choose_modules(
    model: nn.Module, target_modules: Targets = "all-linear", modules_to_save: Collection[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers that ``target_modules`` names (see `swap_`), by name.

    Raises:
        ArgumentTypeError, ArgumentError: targets that match nothing; the message lists similar
            names.
    """
    candidates = _candidates(model)
    names = _select(model, candidates, target_modules, modules_to_save)
    return {name: candidates[name] for name in names}


def is_linear(module: nn.Module) -> TypeGuard["LinearLayer"]:
    """Whether this is an ``nn.Linear`` or a `Conv1D`, and not swapped yet."""
    eager = isinstance(module, nn.Linear) and not isinstance(module, LoraLinear)
    return eager or is_conv1d(module)


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and PEFT's LoRA layers by name, without those inside of such a layer."""
    found: dict[str, nn.Module] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        for child, m in module._modules.items():
            if m is None or isinstance(m, LoraLinear):
                continue
            name = f"{prefix}{child}"
            if is_peft(m) or is_linear(m):
                found[name] = m
            else:
                walk(f"{name}.", m)

    walk("", model)
    return found


def _select(
    model: nn.Module,
    candidates: dict[str, nn.Module],
    targets: Targets,
    modules_to_save: Collection[str],
) -> list[str]:
    saved = tuple(modules_to_save) if not isinstance(modules_to_save, str) else (modules_to_save,)
    names = [n for n in candidates if not any(_ends(n, s) or f".{s}." in f".{n}" for s in saved)]
    peft = [n for n in names if is_peft(candidates[n])]
    if callable(targets) and not isinstance(targets, type):
        chosen = [n for n in names if targets(n, candidates[n])]
    elif targets == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        chosen = peft or [n for n in names if candidates[n] is not head]
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ArgumentError(
                "target_modules", repr(targets), f"a valid regex ({error})"
            ) from None
        chosen = [n for n in names if pattern.fullmatch(n)]
    elif isinstance(targets, Collection) and all(isinstance(t, str) for t in targets):
        matched = match_names("target_modules", targets, names)
        chosen = [n for n in names if n in matched]
    else:
        accepted = '"all-linear", a regex, a collection of names or a function of name and module'
        raise ArgumentTypeError("target_modules", repr(targets), accepted)
    if not chosen:
        raise _no_match("target_modules", targets, names)
    return chosen


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def match_names(argument: str, targets: Collection[str], names: list[str]) -> set[str]:
    """The names that end in one of ``targets``.

    Raises:
        ArgumentError: a target that matches no name; the error is about ``argument``.
    """
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = {n for n in names if _ends(n, target)}
        if not hits:
            raise _no_match(argument, target, names)
        matched |= hits
    return matched


def _no_match(argument: str, targets: object, names: list[str]) -> ArgumentError:
    parts = sorted({n.rpartition(".")[2] for n in names})
    near = difflib.get_close_matches(str(targets), parts + names, n=5, cutoff=0.5) or parts[:10]
    accepted = f"names of linear layers; near ones: {', '.join(near)}" if near else "nothing here"
    return ArgumentError(argument, f"{targets!r}, which matches no linear layer", accepted)
