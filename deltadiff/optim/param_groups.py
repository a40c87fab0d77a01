"""What an optimizer is given: param groups, their values, and weights that may be written."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import DTYPES, check_betas, check_number
from ..errors import ArgumentError, ArgumentTypeError
from ..layers.lora_linear import LoraLinear, lora_layers

ACCEPTED = "a model, or an iterable of parameters, modules or param groups"


def parse(model_or_params: object) -> tuple[list[dict], list[nn.Module]]:
    """Param groups as `torch.optim` takes them, and the modules that they were made from."""
    if isinstance(model_or_params, nn.Module):
        return [{"params": trainable(model_or_params)}], [model_or_params]
    if isinstance(model_or_params, (Tensor, str)) or not isinstance(model_or_params, Iterable):
        raise ArgumentTypeError("model_or_params", type(model_or_params).__name__, ACCEPTED)
    groups, modules, bare = [], [], []
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
    found = [p for p in module.parameters() if p.requires_grad]
    if not found:
        given = f"{type(module).__name__} without trainable parameters"
        raise ArgumentError("model_or_params", given, "a model that `swap_` changed")
    return found


def check_group(group: dict) -> None:
    """Raise unless every value of a param group can be used; the group is not changed."""
    check_lr(group["lr"], group["params"])
    check_betas(group["betas"])
    check_number("eps", group["eps"], 0)
    check_number("weight_decay", group["weight_decay"], 0)
    check_number("update_ratio", group["update_ratio"], 0)
    k = group["start_step"]
    if not isinstance(k, int) or isinstance(k, bool):
        raise ArgumentTypeError("start_step", f"{k!r} ({type(k).__name__})", "an int >= 0")
    if k < 0:
        raise ArgumentError("start_step", k, "an int >= 0")


def check_lr(lr: object, params: list[Tensor]) -> None:
    """A number, or a tensor that a captured step reads (its value stays on the device)."""
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
    if p.numel() == 0 or hasattr(p, "device_mesh"):
        given = f"{type(p).__name__} of shape {tuple(p.shape)}"
        raise ArgumentTypeError("model_or_params", given, "whole tensors (no DTensor, no shard)")
    if p.dtype not in DTYPES or not p.is_contiguous():
        given = f"a {p.dtype} tensor with strides {p.stride()}"
        accepted = "contiguous tensors of " + " or ".join(map(str, DTYPES))
        raise ArgumentTypeError("model_or_params", given, accepted)


def find_layers(modules: list[nn.Module]) -> dict[LoraLinear, str]:
    """The swapped layers of some modules, with their names."""
    return {layer: name for module in modules for name, layer in lora_layers(module).items()}


def find_pairs(
    modules: list[nn.Module], groups: list[dict], index: dict[Tensor, int]
) -> dict[str, LoraLinear]:
    """The layers whose weight is updated: those with their own pair, update ratio above 0.

    ``index``: the group of each parameter.
    """
    pairs = {}
    for layer, name in find_layers(modules).items():
        if layer.share_group is not None:
            continue
        own = [groups[index[p]] for p in (layer.lora_A, layer.lora_B) if p in index]
        settings = [(g["update_ratio"], g["start_step"]) for g in own]
        if not any(ratio for ratio, _ in settings):
            continue
        if layer.gate is not None:
            given = f"an update_ratio above 0 for {name}, which has a gate"
            raise ArgumentError("model_or_params", given, "update_ratio=0 for layers with a gate")
        if len(settings) < 2 or settings[0] != settings[1]:
            given = f"lora_A and lora_B of {name} not both there, or unlike"
            accepted = "both, with one update_ratio and start_step"
            raise ArgumentError("model_or_params", given, accepted)
        if layer.lora_dropout:
            accepted = "0 (Delta-LoRA has no dropout), or update_ratio=0"
            raise ArgumentError(f"lora_dropout of {name}", layer.lora_dropout, accepted)
        pairs[name] = layer
    if not pairs and any(g["update_ratio"] for g in groups):
        given = "no swapped layer with a pair of its own"
        accepted = "a model that `swap_` changed, model=, or update_ratio=0"
        raise ArgumentError("model_or_params", given, accepted)
    return pairs


def check_state(state, groups, w_update, own_state, own_groups) -> None:
    """Raise unless the parts of a state dict fit an optimizer's own state and groups."""
    extra = state.get("delta_lora")
    if extra is None or extra["w_update"] != w_update:
        given = "no Delta-LoRA state" if extra is None else f"w_update={extra['w_update']!r}"
        raise ArgumentError("state_dict", given, f"a state of w_update={w_update!r}")
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
        given = f"groups of {[len(g['params']) for g in groups]} parameters"
        accepted = f"{[len(g['params']) for g in own_groups]}"
        raise ArgumentError("state_dict", given, accepted)
    ids = [i for g in groups for i in g["params"]]
    params = [p for g in own_groups for p in g["params"]]
    for i, p in zip(ids, params, strict=True):
        have = {k: tuple(t.shape) for k, t in own_state[p].items()}
        given = {k: tuple(t.shape) for k, t in state.get(i, {}).items()}
        if given != have:
            raise ArgumentError("state_dict", f"parameter {i} with {given}", str(have))
