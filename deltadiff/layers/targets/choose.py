"""`choose_modules`: the modules of a model that ``target_modules`` names."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable

from torch import nn

from ...errors import ArgumentError, ArgumentTypeError
from ..linear import is_peft
from ..lora_linear import LoraLinear
from ..matrices import find_matrices, why_no_linear
from .eligible import find_refused, is_linear
from .heads import find_heads

Targets = str | Collection[str] | Callable[[str, nn.Module], bool]


def choose_modules(
    model: nn.Module,
    target_modules: Targets = "all-linear",
    modules_to_save: Collection[str] = (),
    *,
    to_swap: bool = False,
) -> dict[str, nn.Module]:
    """The linear layers that ``target_modules`` names (see `swap_`), by name.

    Args:
        to_swap: what gets a pair now: "all-linear" leaves heads out, and what a function chooses
            but cannot be taken is refused. Otherwise what may get one, also in a model on meta.

    Raises:
        ArgumentTypeError, ArgumentError: targets that match nothing; the message lists similar
            names. Or they name something that cannot be taken; the message says why.
    """
    candidates = _candidates(model)
    names = _unsaved(candidates, modules_to_save)
    refused = find_refused(model, on_meta=to_swap)
    if callable(target_modules) and not isinstance(target_modules, type):
        chosen = [n for n in names if target_modules(n, candidates[n])]
        if not to_swap:
            chosen = [n for n in chosen if candidates[n] not in refused]
    elif target_modules == "all-linear":
        heads = find_heads(model)
        apart = heads.modules() if to_swap else heads.outputs
        body = [n for n in names if candidates[n] not in apart]
        chosen = [n for n in names if is_peft(candidates[n])]
        # Where no layer can be taken, the error below says why.
        chosen = chosen or [n for n in body if candidates[n] not in refused] or body
    else:
        others = _other_weights(model)
        others = {n: others[n] for n in _unsaved(others, modules_to_save)}
        chosen = _named(target_modules, names, others)
    if not chosen:
        raise _no_match("target_modules", target_modules, names)
    for name in chosen:
        reason = refused.get(candidates[name])
        if reason is not None:
            raise _refusal(target_modules, name, reason)
    return {name: candidates[name] for name in chosen}


def _candidates(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The linear layers and PEFT's LoRA layers by name, without those inside of such a layer."""
    found: dict[str, nn.Module] = {}
    for child, m in module._modules.items():
        if m is None or isinstance(m, LoraLinear):
            continue
        name = f"{prefix}{child}"
        if is_peft(m) or is_linear(m):
            found[name] = m
        else:
            found |= _candidates(m, f"{name}.")
    return found


def _other_weights(model: nn.Module) -> dict[str, str]:
    """What holds a matrix and is no linear layer: by its name, and what it is."""
    found: dict[str, str] = {}
    for matrix in find_matrices(model):
        if not matrix.is_linear and not matrix.in_peft:
            for name in (matrix.owner, matrix.name):
                found.setdefault(name, why_no_linear(matrix))
    return found


def _unsaved(names: Iterable[str], modules_to_save: Collection[str]) -> list[str]:
    """The names that do not stand in a module of ``modules_to_save``."""
    saved = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
    return [n for n in names if not any(_ends(n, s) or f".{s}." in f".{n}" for s in saved)]


def _named(targets: object, names: list[str], others: dict[str, str]) -> list[str]:
    """The names that a regular expression or a collection of names matches.

    Raises:
        ArgumentTypeError, ArgumentError: it matches one of ``others``; or a name matches none.
    """
    if isinstance(targets, str):
        try:
            matches = re.compile(targets).fullmatch
        except re.error as error:
            accepted = f"a valid regex ({error})"
            raise ArgumentError("target_modules", repr(targets), accepted) from None
        for name, reason in others.items():
            if matches(name):
                raise _refusal(targets, name, reason)
        return [n for n in names if matches(n)]
    if isinstance(targets, Collection) and all(isinstance(t, str) for t in targets):
        for target in targets:
            for name, reason in others.items():
                if _ends(name, target):
                    raise _refusal(target, name, reason)
        matched = match_names("target_modules", targets, names)
        return [n for n in names if n in matched]
    accepted = '"all-linear", a regex, a collection of names or a function of name and module'
    raise ArgumentTypeError("target_modules", repr(targets), accepted)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def match_names(
    argument: str, targets: Collection[str], names: list[str], kind: str = "linear layer"
) -> set[str]:
    """The names that end in one of ``targets``.

    Raises:
        ArgumentError: a target that matches no name of this ``kind``; the error is about
            ``argument``.
    """
    matched: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = {n for n in names if _ends(n, target)}
        if not hits:
            raise _no_match(argument, target, names, kind)
        matched |= hits
    return matched


def _no_match(
    argument: str, targets: object, names: list[str], kind: str = "linear layer"
) -> ArgumentError:
    parts = sorted({n.rpartition(".")[2] for n in names} - {""})
    near = difflib.get_close_matches(str(targets), parts + names, n=5, cutoff=0.5) or parts[:10]
    accepted = f"names of {kind}s; near ones: {', '.join(near)}" if near else "nothing here"
    return ArgumentError(argument, f"{targets!r}, which matches no {kind}", accepted)


def _refusal(targets: object, name: str, reason: str) -> ArgumentTypeError:
    given = f"{targets!r:.80}, which names {name}: {reason}"
    accepted = "layers that do no more than multiply by an ordinary weight"
    return ArgumentTypeError("target_modules", given, accepted)
