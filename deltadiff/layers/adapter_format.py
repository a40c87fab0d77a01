"""The format of a saved adapter: what its two files hold, and the checks of what is read.

    adapter.json                 describes the adapter and names the other file
    adapter-<sha>.safetensors    the tensors

Names of layers and parameters are those of the plain base model, without PEFT's wrappers. The
entries of the JSON object:

    format, version      "deltadiff-adapter", 1
    weights, sha256      name and SHA-256 of the weights file
    base, fingerprint    the shape of each base parameter by name, and the SHA-256 of this table
    layers               an object for each swapped layer, by name
    saved                names of the other parameters that were trained, such as a new head's
    selection            DiffoRA's selection in its own JSON form; only where there is one
    checksum             SHA-256 of all other entries

The object of a layer has ``r``, ``lora_alpha``, ``scaling``, ``lora_dropout``, ``transposed``;
``update_ratio``, a number where Delta-LoRA has started, else null; ``folded``, how many past
updates are stored; and where they apply ``pair_of``, the layer that stores the pair of this one;
``share_group``; and ``gate``, an object with ``shape`` and ``trained``.

The tensors, all in the layout (rank, in) for A and (out, rank) for B:

    <layer>.lora_A, .lora_B            the pair, once for all layers that share it
    <layer>.anchor_A, .anchor_B        Delta-LoRA's anchors, where it has started
    <layer>.folded_A.<i>, .folded_B.<i>    its past updates
    <layer>.gate                       the gate
    <parameter>.saved                  a parameter of ``saved``
"""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from ..errors import CheckpointError
from ..files import as_folder, reading

FORMAT, VERSION = "deltadiff-adapter", 1
CONFIG_FILE = "adapter.json"
WEIGHTS_NAME = r"adapter-[0-9a-f]{16}\.safetensors"


def plain_name(name: str) -> str:
    """The name of a module or parameter as it is without PEFT's wrappers."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def weights_name(digest: str) -> str:
    """The name of the weights file whose SHA-256 is ``digest``."""
    return f"adapter-{digest[:16]}.safetensors"


def is_weights_file(path: Path) -> bool:
    """Whether `save_adapter` wrote this file: its name tells the SHA-256 of what is in it."""
    if not re.fullmatch(WEIGHTS_NAME, path.name):
        return False
    try:
        return weights_name(hashlib.sha256(path.read_bytes()).hexdigest()) == path.name
    except OSError:  # a folder, or not ours to read
        return False


def pair_owner(name: str, entry: dict) -> str:
    """The layer under whose name the pair of layer ``name`` is stored."""
    return entry.get("pair_of", name)


def sha256_of_json(value: object) -> str:
    """The SHA-256 of a value's JSON, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ----------------------------------------------------------------------- reading


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """The JSON object of an adapter (see above), without its checksum; no tensor is read.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty.
        CheckpointError: ``adapter.json`` is missing, garbled, foreign, of another version, or was
            changed after `save_adapter` wrote it.
    """
    path = as_folder("folder", folder) / CONFIG_FILE
    with reading(path, "a file that save_adapter wrote"):
        config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = f"format {config.get('format')!r}" if isinstance(config, dict) else "no JSON object"
        raise CheckpointError(str(path), given, f"format {FORMAT!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(str(path), f"version {config.get('version')}", f"version {VERSION}")
    if config.pop("checksum", None) != sha256_of_json(config):
        raise CheckpointError(str(path), "another checksum (changed by hand?)", "an unchanged file")
    if not re.fullmatch(WEIGHTS_NAME, str(config["weights"])):
        raise CheckpointError(str(path), config["weights"], "a weights file in the same folder")
    selection = config.get("selection")
    if selection is not None and not isinstance(selection, dict):
        accepted = "the JSON object of a selection"
        raise CheckpointError(f"selection in {path}", f"{selection!r:.60}", accepted)
    return config


def read_adapter(folder: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """The JSON object of an adapter and its tensors, which fit together.

    Raises:
        CheckpointError: as `read_adapter_config`; or the weights file is missing, truncated or
            garbled, or holds tensors of other names or shapes than the JSON says.
    """
    config = read_adapter_config(folder)
    path = Path(folder) / config["weights"]
    with reading(path, "the weights that adapter.json names"):
        blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != config["sha256"]:
        given = f"{len(blob)} bytes with another SHA-256 (truncated or changed)"
        raise CheckpointError(str(path), given, f"SHA-256 {config['sha256']}")
    with reading(path, "a safetensors file"):
        tensors = load(blob)
    _check_owners(folder, config)
    _check_shapes(folder, config, tensors)
    return config, tensors


def check_base(folder: str | os.PathLike, config: dict, here: dict[str, list[int]]) -> None:
    """Raise CheckpointError unless the base parameters have the names and shapes of ``here``."""
    if config["fingerprint"] == sha256_of_json(here):
        return
    saved = config["base"]
    differ = sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n))
    name, more = differ[0], f" ({len(differ)} weights differ)" if len(differ) > 1 else ""
    given = f"an adapter for another base model: {name} is {saved.get(name)} there"
    raise CheckpointError(str(folder), given, f"{here.get(name)} as in this model{more}")


def _check_owners(folder: str | os.PathLike, config: dict) -> None:
    """A pair must be stored under the name of a layer that it fits, and that owns its pair."""
    base = config["base"]
    kinds = {
        name: (pair_owner(name, c) == name, c["r"], c.get("transposed"), base[f"{name}.weight"])
        for name, c in config["layers"].items()
    }
    for name, c in config["layers"].items():
        owner = pair_owner(name, c)
        if kinds.get(owner) != (True, *kinds[name][1:]):
            accepted = "the pair of a layer of the same shape"
            raise CheckpointError(str(folder), f"{name} with the pair of {owner}", accepted)


def _check_shapes(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    """The tensors must have the names and shapes that the JSON tells."""
    expected = {f"{name}.saved": config["base"][name] for name in config["saved"]}
    for name, c in config["layers"].items():
        n, k = config["base"][f"{name}.weight"][:: -1 if c.get("transposed") else 1]
        r = c["r"]
        owns, started = pair_owner(name, c) == name, c["update_ratio"] is not None
        for stem, stored in (("lora", owns), ("anchor", started)):
            if stored:
                expected |= {f"{name}.{stem}_A": [r, k], f"{name}.{stem}_B": [n, r]}
        if c.get("gate"):
            expected[f"{name}.gate"] = c["gate"]["shape"]
        for i in range(c["folded"]):  # of any rank, but the same for both factors
            rank = tensors.get(f"{name}.folded_A.{i}", torch.empty(0)).shape[0]
            expected |= {f"{name}.folded_A.{i}": [rank, k], f"{name}.folded_B.{i}": [n, rank]}
    given = {name: list(t.shape) for name, t in tensors.items()}
    differ = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
    if differ:
        name = differ[0]
        raise CheckpointError(
            str(folder), f"tensor {name} of shape {given.get(name)}", f"shape {expected.get(name)}"
        )
