"""`find_matrices`: every weight of a model with two or more dimensions, each once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .linear import linear_shape
from .lora_linear import LoraLinear
from .targets.eligible import is_linear


@dataclass
class Matrix:
    """One weight of a model.

    Attributes:
        owner, attribute: the name of the module that holds it, and what it is called there.
        module: that module.
        shape: what it stands for, which is (out, in) for a linear layer, however it is stored.
        parameter: the tensor; None for a weight that is computed or stored otherwise.
        in_peft: whether one of PEFT's layers adapts it.
        tied: the names of other modules that hold the same tensor.
    """

    owner: str
    attribute: str
    module: nn.Module
    shape: tuple[int, ...]
    parameter: Tensor | None
    in_peft: bool
    tied: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        weight = self.attribute == "weight"
        return self.owner if weight else f"{self.owner}.{self.attribute}".removeprefix(".")

    @property
    def is_linear(self) -> bool:
        return is_linear(self.module) or isinstance(self.module, LoraLinear)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def size_of(p: Tensor) -> int:
    """How many elements a parameter has; 0 for that of a lazy layer, which has no size yet."""
    return 0 if is_lazy(p) else p.numel()


def find_matrices(model: nn.Module) -> list[Matrix]:
    """The base weights of a model: not the pairs of `swap_`, nor what PEFT adds to a layer."""
    found: dict[int, Matrix] = {}
    for matrix in _walk("", model, False, set()):
        key = id(matrix.module if matrix.parameter is None else matrix.parameter)
        first = found.setdefault(key, matrix)
        if first is not matrix:
            first.tied.append(matrix.name)
    return list(found.values())


def _walk(name: str, module: nn.Module, in_peft: bool, seen: set[nn.Module]) -> Iterator[Matrix]:
    if module in seen:
        return
    seen.add(module)
    if is_linear(module) or isinstance(module, LoraLinear):
        weight = module._parameters.get("weight")  # missing where it is computed
        yield Matrix(name, "weight", module, linear_shape(module), weight, in_peft)
        return
    children = dict(module.named_children())
    if "base_layer" in children:  # a layer of PEFT, beside whose base layer stands what PEFT adds
        yield from _walk(name, children["base_layer"], True, seen)
        return
    shape = quantised_shape(module)
    if shape is not None:
        yield Matrix(name, "weight", module, shape, None, in_peft)
        return
    for attribute, p in module.named_parameters(recurse=False):
        if not is_lazy(p) and p.dim() > 1:
            yield Matrix(name, attribute, module, tuple(p.shape), p, in_peft)
    for child, m in children.items():
        unused = child == "original_module" and "modules_to_save" in children  # PEFT's wrapper
        if child == "parametrizations":
            for attribute, p in m.named_parameters():
                if p.dim() > 1:
                    yield Matrix(name, attribute, module, tuple(p.shape), p, in_peft)
        elif not unused:
            yield from _walk(f"{name}.{child}".removeprefix("."), m, in_peft, seen)


def quantised_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of GPTQ, AWQ, HQQ and their like, which is not an nn.Linear.

    Such a class knows its two sizes and holds no ordinary weight; None for all other modules.
    """
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is not None and weight.is_floating_point():
        return None
    for names in (("out_features", "in_features"), ("outfeatures", "infeatures")):
        n, k = (vars(module).get(name) for name in names)
        if isinstance(n, int) and isinstance(k, int):
            return n, k
    return None


def why_no_linear(matrix: Matrix) -> str:
    """What holds this matrix, which is no linear layer, in words."""
    module, kind = matrix.module, type(matrix.module).__name__
    shape = f"({', '.join(map(str, matrix.shape))})"
    if isinstance(module, nn.Embedding):
        return "an embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "a convolution"
    if isinstance(module, nn.MultiheadAttention):
        return "attention's own projections, not an nn.Linear"
    if matrix.parameter is None:
        return f"{kind}, a quantised format that cannot be taken"
    if len(matrix.shape) > 2 and "expert" in f"{matrix.name} {kind}".lower():
        return f"experts {shape}, not an nn.Linear"
    return f"{shape} of {kind}, not an nn.Linear"
