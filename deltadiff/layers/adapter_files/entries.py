"""`check_entries`: the types and ranges of what ``adapter.json`` holds.

The file's checksum shows that nothing changed since it was written, but not who wrote it. All that
is checked here is relied on when the adapter is loaded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..gate import GATES, fits_rank


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _is_number(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e30  # no infinity, no NaN, nothing that float32 cannot hold


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_gate(value: object) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("trained"), bool):
        return False
    return _is_shape(value.get("shape"))


# The entries of the object of a layer: what they may be, in words, and the check.
_LAYER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an int above 0", lambda v: _is_count(v, 1)),
    "scaling": ("a number", _is_number),
    "update_ratio": ("null or a number >= 0", lambda v: v is None or _is_number(v) and v >= 0),
    "folded": ("an int >= 0", _is_count),
}
_LAYER_MAY_LACK: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a probability below 1", lambda v: _is_number(v) and 0 <= v < 1),
    "transposed": ("true or false", lambda v: isinstance(v, bool)),
    "pair_of": ("the name of a layer", lambda v: isinstance(v, str)),
    "share_group": ("null or a name", lambda v: v is None or isinstance(v, str)),
    "gate": ("null or an object with shape and trained", _is_gate),
}


def check_entries(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where an entry has another type or range than the format says."""

    def check(name: str, value: object, holds: bool, accepted: str) -> None:
        if not holds:
            raise CheckpointError(f"{name} in {path}", f"{value!r:.60}", accepted)

    base, layers, saved = (config.get(name) for name in ("base", "layers", "saved"))
    check("base", base, isinstance(base, dict), "an object with shapes by name")
    check("layers", layers, isinstance(layers, dict) and bool(layers), "an object by layer")
    names = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    check("saved", saved, names, "a list of names")
    assert isinstance(base, dict) and isinstance(layers, dict) and isinstance(saved, list)
    for name, shape in base.items():
        check(f"base of {name}", shape, _is_shape(shape), "a list of sizes")
    for name in [*(f"{layer}.weight" for layer in layers), *saved]:
        check(f"base of {name}", None, name in base, "its shape")
    tied = config.get("tied", {})
    whole = isinstance(tied, dict) and all(name in saved for name in tied.values())
    check("tied", tied, whole, "an object with names of saved")
    for layer, entry in layers.items():
        check(layer, entry, isinstance(entry, dict), "an object")
        shape = base[f"{layer}.weight"]
        check(f"base of {layer}.weight", shape, len(shape) == 2, "two sizes")
        for name, (accepted, holds) in {**_LAYER, **_LAYER_MAY_LACK}.items():
            if name in _LAYER or name in entry:
                known = name in entry and holds(entry[name])
                check(f"{name} of {layer}", entry.get(name), known, accepted)
        gate = entry.get("gate")
        check(f"gate of {layer}", gate, not gate or fits_rank(gate["shape"], entry["r"]), GATES)
        updated = entry["folded"] or entry["update_ratio"] is not None
        check(f"gate of {layer}", gate, not (gate and updated), "none beside an update of W")
    selection = config.get("selection")
    whole = selection is None or isinstance(selection, dict)
    check("selection", selection, whole, "the JSON object of a selection")
