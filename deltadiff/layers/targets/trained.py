"""`trained_whole`: the parameters beside the low-rank pairs that `swap_` lets train."""

from collections.abc import Collection

from torch import Tensor, nn

from ...checks import DTYPES, dtype_name
from ...errors import ArgumentError, ArgumentTypeError
from ..lora_layers import HoldsPairs, lora_layers
from .choose import match_names
from .heads import Head, parameters_of


def trained_whole(
    model: nn.Module,
    chosen: Collection[nn.Module],
    modules_to_save: Collection[str],
    heads: Collection[Head],
) -> set[int]:
    """The ids of the parameters that train whole: of ``modules_to_save``, else of new ``heads``.

    Parameters are told by what they are, not by their names, because a tied one has several. What
    trains in a model that is swapped already goes on: a second call adds to the first.

    Args:
        chosen: the modules that get a low-rank pair; their weights are frozen.

    Raises:
        ArgumentTypeError, ArgumentError: a name of ``modules_to_save`` matches nothing that has
            parameters, or something whose parameters cannot be trained (quantised).
    """
    paired = {m for m in model.modules() if isinstance(m, HoldsPairs)}.union(chosen)
    frozen = {id(p) for m in paired for p in m.parameters()}
    saved = {id(p) for p in _saved(model, modules_to_save)}
    new = [p for head in heads for p in parameters_of(head)] if not saved else []
    swapped = bool(lora_layers(model))
    before = [p for p in model.parameters() if swapped and p.requires_grad]
    return saved | ({id(p) for p in new + before if p.dtype in DTYPES} - frozen)


def _saved(model: nn.Module, modules_to_save: Collection[str]) -> list[Tensor]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for name in sorted(match_names("modules_to_save", modules_to_save, list(modules), "module")):
        parameters = list(modules[name].parameters())
        if not parameters:
            given = f"{name}, a {type(modules[name]).__name__} without parameters"
            raise ArgumentError("modules_to_save", given, "modules that can be trained")
        for p in parameters:
            if p.dtype not in DTYPES:
                given = f"{name}, which holds {dtype_name(p.dtype)} weights"
                raise ArgumentTypeError("modules_to_save", given, "modules with float weights")
        found += parameters
    return found
