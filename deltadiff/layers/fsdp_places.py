"""What FSDP2 (`fully_shard`) says of a model: which modules it took, and where parameters stand."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import SwapError
from ..ranks import is_sharded, is_unit, why_no_shard


def check_before_sharding(call: str, model: nn.Module, order: str) -> None:
    """Raise SwapError where a call comes after `fully_shard`; ``order`` says what comes when."""
    if any(map(is_unit, model.modules())):
        given = f"a model that `fully_shard` has sharded before `{call}`"
        raise SwapError("model", given, order)


def check_replaceable(call: str, model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise SwapError where no other layer can take the place of one that is sharded.

    FSDP can be told in which modules its parameters stand. The hooks of tensor parallelism stay
    with the layer that is taken out.
    """
    sharded = any(map(is_unit, model.modules()))
    for name, layer in layers.items():
        if is_unit(layer):
            given = f"{name}, on which `fully_shard` was called itself"
            raise SwapError(call, given, "a unit around it, such as its block or the model")
        if is_sharded(layer.weight) and (not sharded or why_no_shard(layer.weight) is not None):
            given = f"{name}, whose weight tensor parallelism splits"
            raise SwapError(call, given, "a whole model, or one that `fully_shard` shards")


def follow_training(model: nn.Module) -> None:
    """Let FSDP reduce gradients in the dtype of the parameters that are trained now.

    It settles that in its first forward pass. Units that train several dtypes it refuses itself.
    """
    for group in _all_groups(model):
        trained = [p.sharded_param for p in group.fsdp_params if p.sharded_param.requires_grad]
        if len({p.dtype for p in trained}) == 1:
            group._init_mp_dtypes()


def follow_layers(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Let FSDP put whole parameters into the new layers, which hold the sharded ones already.

    FSDP notes the module and the name of each parameter when `fully_shard` is called. Parameters
    that the new layer does not have are gathered no more.
    """
    for group in _all_groups(model):
        kept = []
        for p in group.fsdp_params:
            place = p._module_info
            new = replacements.get(place.module, place.module)
            place.shared_modules = [replacements.get(m, m) for m in place.shared_modules]
            if place.param_name in new._parameters:
                place.module = new
                kept.append(p)
        group.fsdp_params = kept
        hooks = (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        )
        if any(hooks):  # FSDP was asked for a forward pass before, which puts them on
            for handles in hooks:
                for handle in handles.values():
                    handle.remove()
                handles.clear()
            group._register_state_dict_hooks()


def _all_groups(model: nn.Module) -> list[Any]:
    """FSDP's groups of parameters, of all units of a model."""
    units: list[Any] = [m for m in model.modules() if is_unit(m)]
    return [group for unit in units for group in _groups(unit)]


def _groups(unit: Any) -> list[Any]:
    """The groups of a unit; older versions of torch have one at most."""
    state = unit._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return state._fsdp_param_groups
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
