"""What an optimizer is given: parameters, param groups and their values, a saved state."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import DTYPES, check_betas, check_number
from ..errors import ArgumentError, ArgumentTypeError
from ..layers.lora_layers import LoraLayer, lora_layers
from ..ranks import is_partitioned, local
from .shards import check_shards
from .zero_vectors import check_no_vectors

# What an optimizer takes: a model, or parameters, modules and param groups in any mixture.
ModelOrParams = nn.Module | Iterable[Tensor | nn.Module | dict[str, Any]]
ACCEPTED = "a model, or an iterable of parameters, modules or param groups"


def parse_groups(model_or_params: object) -> tuple[list[dict[str, Any]], list[nn.Module]]:
    """Param groups as `torch.optim` takes them, and the modules that they were made from."""
    if isinstance(model_or_params, nn.Module):
        return [{"params": trainable(model_or_params)}], [model_or_params]
    if isinstance(model_or_params, (Tensor, str)) or not isinstance(model_or_params, Iterable):
        raise ArgumentTypeError("model_or_params", type(model_or_params).__name__, ACCEPTED)
    groups: list[dict[str, Any]] = []
    modules: list[nn.Module] = []
    bare: list[Tensor] = []
    for item in model_or_params:
        if isinstance(item, nn.Module):
            modules.append(item)
            bare += trainable(item)
        elif isinstance(item, Tensor):
            bare.append(item)
        elif isinstance(item, dict) and isinstance(item.get("params"), nn.Module):
            modules.append(item["params"])
            groups.append({**item, "params": trainable(item["params"])})
        elif isinstance(item, dict) and "params" in item:
            groups.append(dict(item))
        else:
            raise ArgumentTypeError("model_or_params", f"an item {item!r:.60}", ACCEPTED)
    return ([{"params": bare}] if bare else []) + groups, modules


def trainable(module: nn.Module) -> list[Tensor]:
    """The parameters of a module that require a gradient; raises where there are none."""
    found: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    if not found:
        given = f"{type(module).__name__} without trainable parameters"
        raise ArgumentError("model_or_params", given, "a module with some, as after `swap_`")
    return found


def group_indices(groups: list[dict[str, Any]]) -> dict[Tensor, int]:
    """Every parameter, in order, with the index of its group."""
    return {p: i for i, group in enumerate(groups) for p in group["params"]}


def check_group(group: dict[str, Any]) -> None:
    """Raise unless AdamW can use every value of a param group."""
    check_lr(group["lr"], group["params"])
    check_betas(group["betas"])
    check_number("eps", group["eps"], 0)
    check_number("weight_decay", group["weight_decay"], 0)


def check_lr(lr: object, params: list[Tensor]) -> None:
    """Raise unless ``lr`` is a number >= 0, or a tensor beside the parameters that holds one.

    The value of a tensor on the GPU is not looked at, because that would wait for the device.
    """
    if not isinstance(lr, Tensor):
        check_number("lr", lr, 0)
        return
    if lr.dim() or lr.dtype not in (torch.float32, torch.float64):
        given = f"a {lr.dtype} tensor of shape {tuple(lr.shape)}"
        raise ArgumentTypeError("lr", given, "a float, or a 0-dim tensor of float32 or float64")
    for p in params if isinstance(params, list) else [params]:
        if isinstance(p, Tensor) and p.device != lr.device:
            raise ArgumentTypeError("lr", f"a tensor on {lr.device}", f"one on {p.device}")
    if lr.device.type == "cpu":
        check_number("lr", lr.item(), 0)


def check_parameter(p: Tensor) -> None:
    """Raise unless the kernels can write a parameter as it is."""
    check_shards("model_or_params", p)
    if is_partitioned(p):
        given = "parameters that DeepSpeed's ZeRO-3 has partitioned"
        accepted = "an optimizer that is made before `deepspeed.initialize`"
        raise ArgumentTypeError("model_or_params", given, accepted)
    if p.numel() == 0:
        given = f"{type(p).__name__} of shape {tuple(p.shape)}"
        raise ArgumentTypeError("model_or_params", given, "tensors that are not empty")
    if p.dtype not in DTYPES or not local(p).is_contiguous():
        given = f"a {p.dtype} tensor with strides {p.stride()}"
        accepted = "contiguous tensors of " + " or ".join(map(str, DTYPES))
        raise ArgumentTypeError("model_or_params", given, accepted)


def layer_names(modules: list[nn.Module]) -> dict[LoraLayer, str]:
    """The swapped layers of some modules, with their names.

    Where two modules have a layer of one name, names start with the module's place in the list.
    """
    found = {
        layer: (str(i), name)
        for i, module in enumerate(modules)
        for name, layer in lora_layers(module).items()
    }
    names = {layer: name for layer, (_, name) in found.items()}
    if len(set(names.values())) < len(names):
        names = {layer: ".".join(filter(None, place)) for layer, place in found.items()}
    return names


def find_pairs(
    modules: list[nn.Module], groups: list[dict[str, Any]], kept: Collection[Tensor] = ()
) -> dict[str, LoraLayer]:
    """The layers whose weight is updated: those with a pair of their own and an update ratio > 0.

    ``kept``: each lora_B of a layer that stays among them while its ratio is 0.

    Raises:
        ArgumentError: such a layer has a gate, dropout, or a pair that the groups hold in part;
            update ratios above 0 without any such layer.
    """
    pairs: dict[str, LoraLayer] = {}
    index = group_indices(groups)
    for layer, name in layer_names(modules).items():
        if layer.share_group is not None:
            continue
        own = [groups[index[p]] for p in (layer.lora_A, layer.lora_B) if p in index]
        settings = [(g["update_ratio"], g["start_step"]) for g in own]
        if not any(ratio for ratio, _ in settings) and not (own and layer.lora_B in kept):
            continue
        if len(settings) < 2 or settings[0] != settings[1]:
            given = f"lora_A and lora_B of {name} not both there, or unlike"
            accepted = "both, with one update_ratio and start_step"
            raise ArgumentError("model_or_params", given, accepted)
        reason = layer.why_no_update()
        if reason is not None:
            accepted = "plain LoRA layers without dropout, or update_ratio=0"
            raise ArgumentError("model_or_params", f"{name} with {reason}", accepted)
        pairs[name] = layer
    if not pairs and any(g["update_ratio"] for g in groups):
        check_no_vectors(modules, index)
        given = "no swapped layer with a pair of its own"
        accepted = "a model that `swap_` changed, model=, or update_ratio=0"
        raise ArgumentError("model_or_params", given, accepted)
    return pairs
