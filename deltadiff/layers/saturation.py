"""What is said of a float16 weight that an update in place took to the end of float16's range."""

import warnings
from collections.abc import Mapping

import torch

from ..ops.reference import past_range
from ..ranks import local
from .lora_layers import LoraLayer


def warn_saturated(layers: Mapping[str, LoraLayer]) -> None:
    """Say once for each layer where its float16 W stopped at +-65504.

    It reads the weights, which waits for the device. So it is called where a run is saved, and not
    in a step.
    """
    found = {}
    for name, layer in layers.items():
        delta = layer.delta
        if delta is None or delta.remainder is None or layer.weight.dtype != torch.float16:
            continue
        if not delta.told_saturated:
            w, low = local(layer.matrix.detach()), local(delta.remainder)
            count = int(past_range(w, low).sum())
            if count:
                found[name] = count
                delta.told_saturated = True
    if found:
        warnings.warn(saturated_message("the updates took", found), stacklevel=3)


def saturated_message(what: str, counts: Mapping[str, int]) -> str:
    """The warning: what was done, and how many elements of which weights are past the range."""
    elements = ", ".join(f"{count} elements of {name}" for name, count in counts.items())
    return (
        f"{what} {elements} past the range of float16; they stay at its end, +-65504, and what "
        "goes beyond is lost. A base model in bfloat16 has the range of float32"
    )
