"""The names of an adapter of PEFT: of its files, and of the modules and tensors that it is about.

PEFT's configuration names modules by endings or regular expressions, which may match more than was
meant. The functions here follow its rules over the modules of a model, so that what is exported
names exactly the layers that it should, and what is read is read as PEFT reads it.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ...errors import SwapError
from ..lora_layers import HoldsPairs, LoraLayer
from ..plain_names import INNER

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the name of every tensor in the weights file
_PLAIN_LORA = "plain LoRA and modules_to_save; PEFT's own save_pretrained has all of it"


# ----------------------------------------------------------------------- the base model


def base_model(model: nn.Module) -> nn.Module:
    """The model inside of the wrappers of DDP, `torch.compile` and PEFT."""
    while True:
        inner: Any = _unwrap(model)
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = inner.module
        elif is_of_peft(inner) and hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        if inner is model:
            return model
        model = inner


def is_of_peft(module: nn.Module) -> bool:
    """Whether the module's class is PEFT's, or made of one of PEFT's."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)


def plain_name(name: str) -> str:
    """A name inside of a `base_model`, without the wrappers that may stand around any module."""
    return ".".join(part for part in name.split(".") if part not in INNER)


def base_modules(base: nn.Module) -> dict[str, nn.Module]:
    """The modules of a `base_model` by plain name, without those inside of a layer with a pair.

    A module that stands in several places has several names. In the place of PEFT's wrapper around
    a module that it saves whole there is the copy that is active.

    Raises:
        SwapError: another module of PEFT.
    """
    return dict(_walk(base, ""))


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    module = _unwrap(module)
    if isinstance(module, HoldsPairs):
        yield name, module
        return
    if is_of_peft(module):
        module = _active_copy(name, module)
    yield name, module
    for child, m in module._modules.items():
        if m is not None:
            yield from _walk(m, f"{name}.{child}" if name else child)


def _active_copy(name: str, wrapper: Any) -> nn.Module:
    """The module that PEFT's wrapper for a module that it saves whole calls."""
    if not hasattr(wrapper, "modules_to_save"):
        raise SwapError(name, f"PEFT's {type(wrapper).__name__}", _PLAIN_LORA)
    copies = [a for a in wrapper.active_adapters if a in wrapper.modules_to_save]
    return wrapper.modules_to_save[copies[0]] if copies else wrapper.original_module


def active_pairs(name: str, module: Any) -> list[LoraLayer]:
    """The pairs of a `HoldsPairs` that are active, whether PEFT has disabled all of them or not.

    Raises:
        SwapError: a layer of PEFT that does more than plain LoRA on a linear layer.
    """
    pairs = [pair for pair in module.pairs().values() if pair.active]
    if any(pair.in_peft for pair in pairs):
        adapters = [a for a in module.active_adapters if a in module.lora_A]
        reasons = [f"a variant of LoRA ({a})" for a in adapters if a in module.lora_variant]
        reasons += [f"a lora_bias ({a})" for a in adapters if module.lora_bias[a]]
        if module.base_layer is not pairs[0].holder:
            reasons.append("another tuner's layer inside of it")
        if reasons:
            raise SwapError(name, f"PEFT's layer with {reasons[0]}", _PLAIN_LORA)
    return pairs


def _unwrap(module: nn.Module) -> nn.Module:
    """The module without the wrappers that may stand around any module."""
    while inner := [m for key in INNER if (m := module._modules.get(key)) is not None]:
        (module,) = inner
    return module


def check_places(base: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise SwapError for a layer that stands in several places: PEFT adapts it in one of them."""
    names = {id(module): name for name, module in layers.items()}
    children = [m for parent in base.modules() for m in parent._modules.values()]
    for name, count in Counter(names[id(m)] for m in children if id(m) in names).items():
        if count > 1:
            given = f"a layer that stands in {count} places, of which PEFT adapts one"
            raise SwapError(name, given, "a layer of its own; a whole model can be saved merged")


# -------------------------------------------------------- entries of the configuration


def target_modules(layers: Collection[str], modules: Collection[str]) -> list[str] | str:
    """``target_modules`` that matches these layers, and no other of the modules.

    The full names are enough, unless one of them is the ending of another module's name; then it is
    a regular expression, which PEFT matches with whole names.
    """
    endings = tuple(f".{name}" for name in layers)
    if any(name.endswith(endings) for name in modules if name not in layers):
        return "|".join(re.escape(name) for name in sorted(layers))
    return sorted(layers)


def pattern_regex(key: str) -> re.Pattern[str]:
    """The regular expression that a key of ``rank_pattern`` or ``alpha_pattern`` stands for."""
    return re.compile(rf"(.*\.)?({key})$")


def look_up(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of a layer in ``rank_pattern`` or ``alpha_pattern``."""
    found = (value for key, value in patterns.items() if pattern_regex(key).match(name))
    return next(found, default)


def pattern_of(values: Mapping[str, int], default: int) -> dict[str, int]:
    """A ``rank_pattern`` or ``alpha_pattern`` that gives each layer its value."""
    others = {name: value for name, value in values.items() if value != default}
    if all(re.fullmatch(r"[\w.]+", name) for name in others) and all(
        look_up(others, name, default) == value for name, value in values.items()
    ):
        return others
    return {f"^{re.escape(name)}": value for name, value in others.items()}
