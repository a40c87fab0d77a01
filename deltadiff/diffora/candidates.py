"""`Candidates`: the modules of a model among which DiffoRA chooses, and how they are found.

They form a table with a row for each layer of the model's stack and a column for each module type.
It is plain data: names, without tensors.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from ..errors import ArgumentError, ArgumentTypeError
from ..layers.linear import refuse_peft
from ..layers.lora_linear import LoraLinear
from ..layers.targets.choose import Targets, choose_modules


@dataclass(frozen=True)
class Candidates:
    """The layers of a stack, and in each the linear modules that may get a low-rank pair.

    Attributes:
        layers: names of the layers, such as "bert.encoder.layer.0".
        modules: for each layer, the names of the modules inside of it, such as
            "attention.self.query". Such a name is called a module type.
        outside: linear layers that ``target_modules`` names but that stand in no stack; DiffoRA
            leaves them alone.
    """

    layers: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    outside: tuple[str, ...] = field(default=(), compare=False)

    @property
    def types(self) -> tuple[str, ...]:
        """All module types, in the order in which they first appear."""
        return tuple(dict.fromkeys(t for types in self.modules for t in types))

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        """For the full name of each candidate: (index of its layer, index of its module type)."""
        column = {t: j for j, t in enumerate(self.types)}
        return {
            f"{layer}.{t}": (i, column[t])
            for i, (layer, types) in enumerate(zip(self.layers, self.modules, strict=True))
            for t in types
        }


def find_candidates(
    model: nn.Module,
    target_modules: Targets = "all-linear",
    modules_to_save: Collection[str] = (),
) -> Candidates:
    """The linear modules of each layer in the model's stacks.

    A stack is an outermost ``nn.ModuleList`` whose elements hold linear modules, as in BERT,
    RoBERTa, DeBERTa, GPT-2, Llama and Qwen. Its layers may differ in their modules.

    Args:
        model: an eager model.
        target_modules, modules_to_save: as for `swap_`.

    Raises:
        ArgumentTypeError, ArgumentError: the model has no module that stands in a stack, a layer
            with a single module (which leaves nothing to choose), or layers of PEFT.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    refuse_peft("DiffoRA", model)
    chosen = choose_modules(model, target_modules, modules_to_save)
    lists = {
        name
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.ModuleList)
    }
    layers: dict[str, list[str]] = {}
    outside, seen = [], set()
    for name, module in chosen.items():
        if id(module) in seen:  # one module in two places has one gate
            continue
        seen.add(id(module))
        layer, kind = _split(name, lists)
        if kind:
            layers.setdefault(layer, []).append(kind)
        else:
            outside.append(name)
    if not layers:
        given = f"{target_modules!r:.60}, which names no module of a stack of layers"
        raise ArgumentError("target_modules", given, "linear modules inside of an nn.ModuleList")
    for layer, types in layers.items():
        if len(types) < 2:
            given = f"one module in {layer}: {types[0]}"
            raise ArgumentError("target_modules", given, "at least two modules in each layer")
    return Candidates(tuple(layers), tuple(map(tuple, layers.values())), tuple(outside))


def swapped_candidate(model: nn.Module, name: str) -> LoraLinear:
    """The layer that `swap_` put in the place of the candidate called ``name``."""
    layer = model.get_submodule(name)
    assert isinstance(layer, LoraLinear)
    return layer


def _split(name: str, lists: set[str]) -> tuple[str, str]:
    """The name of a module's layer, and its name inside of it; both are empty outside of stacks."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        if ".".join(parts[:i]) in lists:
            return ".".join(parts[: i + 1]), ".".join(parts[i + 1 :])
    return "", ""
