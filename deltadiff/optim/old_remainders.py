"""Optimizer states from versions that kept a float16 remainder beside a float16 weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..layers.lora_layers import LoraLayer
from ..ops.reference import split_remainder


def renew_remainders(state_dict: dict[str, Any], layers: Mapping[int, LoraLayer]) -> dict[str, Any]:
    """``state_dict`` of DeltaLoRA, with int16 remainders in the place of float16 ones.

    The remainder was the rounding error of W, so their float32 sum is the weight that the state
    stands for. It is split anew, into W and remainder. The state itself is not changed, and what
    does not fit is left to the checks that follow.

    Args:
        layers: the layers that are updated in place, by the number of their lora_B in the state.
    """
    state = dict(state_dict["state"])
    weights = dict(state["delta_lora"].get("weights", {}))
    for i, layer in layers.items():
        low, w = state.get(i, {}).get("remainder"), weights.get(i)
        pair = [t for t in (low, w) if isinstance(t, Tensor) and t.dtype == torch.float16]
        if len(pair) < 2:
            continue
        matrix = w.T if layer.transposed else w
        if matrix.shape != low.shape:
            continue
        high, low = split_remainder(matrix.float() + low.float(), torch.float16)
        weights[i] = high.T if layer.transposed else high
        state[i] = {**state[i], "remainder": low}
    state["delta_lora"] = {**state["delta_lora"], "weights": weights}
    return {**state_dict, "state": state}
