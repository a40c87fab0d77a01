"""Layers whose W was rounded in each step, so that it is not quite the sum of the updates.

A 16-bit W that is updated in place with rounding "nearest" or "stochastic" loses or changes a part
of each update. Files that hold the updates as factors hold all of them, so a model that gets them
back is not quite the one that was trained. How far it is depends on the weights from before the
training, which nobody has kept; `deltadiff finetune` loads them again and tells the figure.
"""

from collections.abc import Mapping, Sequence

from ..checks import HALF_DTYPES
from .lora_layers import LoraLayer

ROUNDED = r"W of \d+ layers, .* was rounded in each step"  # as a filter of warnings


def rounding_note(layers: Mapping[str, Sequence[LoraLayer]]) -> str | None:
    """What to say of a file with the updates of these layers as factors; None for nothing."""
    rounded = [name for name, pairs in layers.items() if any(map(_was_rounded, pairs))]
    if not rounded:
        return None
    return (
        f"W of {len(rounded)} layers, {rounded[0]} among them, was rounded in each step, so it is "
        "not quite the sum of the updates, which this adapter holds. To keep it as it is, save "
        "`model.state_dict()`, or call `merge_` and save the whole model; rounding='remainder' "
        "loses nothing"
    )


def _was_rounded(pair: LoraLayer) -> bool:
    delta = pair.delta
    if delta is None or not delta.in_weight or delta.remainder is not None:
        return False
    return pair.weight.dtype in HALF_DTYPES and delta.changes_model()
