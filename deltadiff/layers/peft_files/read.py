"""`read_peft`: what a folder with a LoRA adapter of PEFT holds.

The weights file decides which layers get a pair, and of which rank; ``target_modules`` is not
read. Whatever makes the adapter more than a plain pair for each layer is refused by name, for
instance DoRA or initial values that change the base weights.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from ...errors import CheckpointError
from ...files import as_folder, reading
from ..adapter_files import format as adapter_format
from .names import CONFIG_FILE, PREFIX, WEIGHTS_FILE, look_up, pattern_regex

_INSTEAD = "plain LoRA; for all else call PeftModel.from_pretrained, then swap_"
# What is read here, and what changes nothing in a model that is loaded. No other entry may be set.
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout",
    "bias", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_NO_PLAIN_LORA = r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|base_layer\.weight)(\.|$)"
# With other initial values PEFT takes a part out of the base weights when it loads the adapter.
_INITIAL_VALUES = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftPair:
    """The pair of a layer: A (r, in), B (out, r), and the numbers that scale it."""

    A: Tensor
    B: Tensor
    lora_alpha: float
    scaling: float


@dataclass(frozen=True)
class PeftAdapter:
    """What a folder of PEFT's holds, by the names of the base model.

    Attributes:
        pairs: by layer.
        saved: the parameters and buffers that were saved whole, such as a new head's.
        lora_dropout: of all pairs.
        ties: whether modules that are tied in the base stay tied when one of them was saved.
    """

    pairs: dict[str, PeftPair]
    saved: dict[str, Tensor]
    lora_dropout: float
    ties: bool


def is_peft_folder(folder: str | os.PathLike) -> bool:
    """Whether the folder holds an adapter of PEFT, and none that `save_adapter` wrote.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty.
    """
    path = as_folder("folder", folder)
    return (path / CONFIG_FILE).exists() and not (path / adapter_format.CONFIG_FILE).exists()


# ------------------------------------------------------------------------------ reading


def read_peft(folder: str | os.PathLike) -> PeftAdapter:
    """Read an adapter of PEFT.

    Raises:
        CheckpointError: a file is missing or garbled, the two do not fit together, the weights are
            a pickle, or the adapter is more than plain LoRA; the message names the entry.
    """
    path = as_folder("folder", folder) / CONFIG_FILE
    with reading(path, "a configuration that PEFT wrote"):
        config = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise CheckpointError(str(path), type(config).__name__, "a JSON object")
    _check_config(path, config)
    weights = path.with_name(WEIGHTS_FILE)
    if not weights.exists() and weights.with_suffix(".bin").exists():
        given = f"{weights.stem}.bin, a pickle, which may run code"
        raise CheckpointError(str(path.parent), given, f"{WEIGHTS_FILE}, as PEFT saves by default")
    with reading(weights, "a safetensors file of PEFT"):
        tensors = load(weights.read_bytes())
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, t in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        if factor:
            factors.setdefault(factor[1], {})[factor[2]] = t
        elif re.search(_NO_PLAIN_LORA, name):
            raise CheckpointError(
                f"{key} in {weights}", "more than a pair of a linear layer", _INSTEAD
            )
        else:
            saved[name.replace(".base_layer.bias", ".bias")] = t
    if not factors:
        raise CheckpointError(str(weights), "no pair", _INSTEAD)
    pairs = {name: _pair(path, config, name, ab) for name, ab in sorted(factors.items())}
    ties = bool(config.get("ensure_weight_tying"))
    return PeftAdapter(pairs, saved, float(config.get("lora_dropout", 0)), ties)


def _check_config(path: Path, config: dict) -> None:
    """Raise CheckpointError unless the configuration is one of plain LoRA, of the right types."""

    def refuse(field: str, accepted: str = _INSTEAD) -> CheckpointError:
        return CheckpointError(f"{field} in {path}", f"{config.get(field)!r:.60}", accepted)

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type")
    for field, value in config.items():
        if value and field not in _READ and field not in _WITHOUT_EFFECT:
            raise refuse(field)
    if config.get("init_lora_weights") not in _INITIAL_VALUES:
        raise refuse("init_lora_weights")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise refuse("bias")
    if not _is_rank(config.get("r")):
        raise refuse("r", "a rank >= 1")
    if not _is_number(config.get("lora_alpha")):
        raise refuse("lora_alpha", "a number")
    if not _is_number(config.get("lora_dropout", 0)) or not 0 <= config.get("lora_dropout", 0) < 1:
        raise refuse("lora_dropout", "a probability below 1")
    for field in ("use_rslora", "ensure_weight_tying"):
        if config.get(field) not in (None, True, False):
            raise refuse(field, "true or false")
    for field, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            raise refuse(field, "a value for each pattern of names")
        for key in pattern:
            with reading(path, f"regular expressions in {field}"):
                pattern_regex(key)


def _is_number(value: object) -> bool:
    """Whether it is a number that is neither NaN nor past all use."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _pair(path: Path, config: dict, name: str, factors: dict[str, Tensor]) -> PeftPair:
    """The pair of a layer, which must have the rank that the configuration says."""
    r = look_up(config.get("rank_pattern") or {}, name, config["r"])
    alpha = look_up(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    shapes = {key: tuple(t.shape) for key, t in factors.items() if t.is_floating_point()}
    a, b = shapes.get("A", ()), shapes.get("B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != r or b[1] != r:
        given = f"lora_A and lora_B of {name} with shapes {a} and {b}"
        raise CheckpointError(str(path.with_name(WEIGHTS_FILE)), given, f"two of rank {r}")
    scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
    return PeftPair(factors["A"], factors["B"], alpha, scaling)
