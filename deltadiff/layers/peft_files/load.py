"""`load_peft`: put a LoRA adapter of PEFT on its base model, with layers of deltadiff."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...errors import ArgumentError, CheckpointError, SwapError
from ..base_format import check_backend
from ..linear import check_rank, is_peft_model, linear_shape
from ..lora_layers import lora_layers
from ..lora_linear import LoraLinear
from ..report import SwapReport, swap_report
from ..swap import swap_, unswap_
from ..targets.eligible import is_linear
from .names import base_model, base_modules, check_places
from .read import PeftAdapter, read_peft


def load_peft(model: nn.Module, folder: str | os.PathLike, backend: str | None) -> SwapReport:
    """`load_adapter` for a folder of PEFT's: swaps the layers that have a pair there.

    Raises:
        CheckpointError: as `read_peft`, or the adapter is for another base model.
        SwapError: the model is swapped already, or its layers are PEFT's.
        ArgumentError: `swap_` refuses a layer. Whatever is raised, nothing was changed.
    """
    adapter = read_peft(folder)
    if is_peft_model(model):
        accepted = "a plain model; PEFT's own load_adapter loads into PEFT's layers, then swap_"
        raise SwapError("model", "layers of PEFT", accepted)
    if lora_layers(model):
        raise SwapError("model", "a model that is swapped already", "an eager model (`unswap_`)")
    base = base_model(model)
    modules = base_modules(base)
    _check_layers(folder, adapter, modules, backend)
    check_places(base, {name: modules[name] for name in adapter.pairs})
    targets = _saved_tensors(folder, adapter, modules)
    try:
        for r in sorted({pair.A.shape[0] for pair in adapter.pairs.values()}):
            group = {modules[n] for n, pair in adapter.pairs.items() if pair.A.shape[0] == r}
            swap_(
                model, r=r, lora_dropout=adapter.lora_dropout, backend=backend,
                target_modules=_chosen(group),
            )  # fmt: skip
    except ArgumentError:
        if lora_layers(model):
            unswap_(model)
        raise
    swapped = base_modules(base)
    with torch.no_grad():
        for name, pair in adapter.pairs.items():
            layer = swapped[name]
            assert isinstance(layer, LoraLinear)
            layer.lora_A.copy_(pair.A)
            layer.lora_B.copy_(pair.B)
            layer.lora_alpha, layer.scaling = pair.lora_alpha, pair.scaling
        for name, t in targets.items():
            t.copy_(adapter.saved[name])
            t.requires_grad_(isinstance(t, nn.Parameter) and t.is_floating_point())
    return swap_report(model)


def _chosen(modules: set[nn.Module]) -> Callable[[str, nn.Module], bool]:
    """A choice of ``target_modules`` by the modules themselves."""
    return lambda _, module: module in modules


def _check_layers(
    folder: str | os.PathLike,
    adapter: PeftAdapter,
    modules: dict[str, nn.Module],
    backend: str | None,
) -> None:
    """Raise unless every pair fits a linear layer of the base model."""
    for name, pair in adapter.pairs.items():
        module, shape = modules.get(name), (pair.B.shape[0], pair.A.shape[1])
        if module is None or not is_linear(module):
            raise _other_base(folder, f"{name} is {shape} there", "linear layers of this model")
        if linear_shape(module) != shape:
            accepted = f"{linear_shape(module)} as in this model"
            raise _other_base(folder, f"{name} is {shape} there", accepted)
        check_rank(f"r of {name}", pair.A.shape[0], name, module)
        check_backend(module, pair.A.shape[0], adapter.lora_dropout, backend)


def _saved_tensors(
    folder: str | os.PathLike, adapter: PeftAdapter, modules: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """The parameters and buffers of the base model that the adapter has whole, by name."""
    own = {
        f"{name}.{key}".removeprefix("."): t
        for name, module in modules.items()
        for key, t in (module._parameters | module._buffers).items()
        if t is not None
    }
    holders: dict[int, set[str]] = {}
    for name, t in own.items():
        holders.setdefault(id(t), set()).add(name)
    for name, t in adapter.saved.items():
        here = own.get(name)
        if here is None or here.shape != t.shape:
            accepted = "a parameter of this model" if here is None else f"{tuple(here.shape)} here"
            raise _other_base(folder, f"{name} is {tuple(t.shape)} there", accepted)
        if here.is_floating_point() != t.is_floating_point() or t.is_complex():
            raise CheckpointError(str(folder), f"{name} of {t.dtype}", f"{here.dtype} here")
        for other in () if adapter.ties else holders[id(here)] - {name}:
            theirs = adapter.saved.get(other)
            if theirs is None or not torch.equal(theirs.double(), t.double()):
                given = f"{name} of another value than {other}, to which it is tied in this model"
                raise CheckpointError(str(folder), given, "a model in which they are not tied")
    return {name: own[name] for name in adapter.saved}


def _other_base(folder: str | os.PathLike, given: str, accepted: str) -> CheckpointError:
    return CheckpointError(str(folder), f"an adapter for another base model: {given}", accepted)
