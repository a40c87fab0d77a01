"""The format of a saved adapter: what its two files hold, and how they are read.

    adapter.json                 describes the adapter and names the other file
    adapter-<sha>.safetensors    the tensors

Names and shapes are those of the plain base model, whatever is wrapped around it and however it
stores its weights: the shape of a linear layer's weight is (out, in), also where NF4 stores bytes
or GPT-2's `Conv1D` (in, out). The entries of the JSON object:

    format, version      "deltadiff-adapter", 2
    weights, sha256      name and SHA-256 of the weights file
    base                 shapes by name: of weight and bias of each swapped layer, and of ``saved``
    layers               an object for each swapped layer, by name
    saved                names of what else was trained, such as a new head's parameters, and of
                         the buffers beside them
    tied                 for each further name of one of these the name it is saved under; only
                         where there is one
    selection            DiffoRA's selection in its own JSON form; only where there is one
    checksum             SHA-256 of all other entries

The object of a layer has ``r``, ``lora_alpha``, ``scaling``, ``lora_dropout``; ``update_ratio``, a
number where Delta-LoRA has started, else null; ``folded``, how many past updates are stored; and
where they apply ``pair_of``, the layer that stores the pair of this one; ``share_group``; and
``gate``, an object with ``shape`` (see `gate.py`) and ``trained``.

The tensors, all in the layout (rank, in) for A and (out, rank) for B:

    <layer>.lora_A, .lora_B            the pair, once for all layers that share it
    <layer>.anchor_A, .anchor_B        Delta-LoRA's anchors, where it has started
    <layer>.folded_A.<i>, .folded_B.<i>    its past updates
    <layer>.gate                       the gate
    <name>.saved                       what is in ``saved``

Version 1 is read too. There ``base`` has the stored shapes of all parameters, names may be those
of a wrapped model, a weight in ``saved`` lies as the base stored it, and a layer has
``transposed``.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from ...errors import CheckpointError
from ...files import as_folder, reading, sha256_of_json
from ..plain_names import plain_name
from .entries import check_entries

FORMAT, VERSION = "deltadiff-adapter", 2
VERSIONS = (1, VERSION)  # that are read
CONFIG_FILE = "adapter.json"
WEIGHTS_NAME = r"adapter-[0-9a-f]{16}\.safetensors"
_OF_LAYER = re.compile(r"(.*)\.((?:lora|anchor)_[AB]|folded_[AB]\.\d+|gate)")


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


def is_config_file(path: Path) -> bool:
    """Whether `save_adapter` wrote this file, in any version."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def pair_owner(name: str, entry: dict) -> str:
    """The layer under whose name the pair of layer ``name`` is stored."""
    return entry.get("pair_of", name)


# ----------------------------------------------------------------------- reading


def read_adapter_config(folder: str | os.PathLike) -> dict:
    """The JSON object of an adapter (see above), without its checksum; no tensor is read.

    That of version 1 is given in the form of version 2, but for its number.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty.
        CheckpointError: ``adapter.json`` is missing, garbled, foreign, of another version, or was
            changed after `save_adapter` wrote it.
    """
    path = as_folder("folder", folder) / CONFIG_FILE
    with reading(path, "a file that save_adapter wrote"):
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            kind = isinstance(config, dict)
            given = f"format {config.get('format')!r}" if kind else "no JSON object"
            raise CheckpointError(str(path), given, f"format {FORMAT!r}")
        if config.get("version") not in VERSIONS:
            accepted = f"version {' or '.join(map(str, VERSIONS))}"
            raise CheckpointError(str(path), f"version {config.get('version')}", accepted)
        if config.pop("checksum", None) != sha256_of_json(config):
            given = "another checksum (changed by hand?)"
            raise CheckpointError(str(path), given, "an unchanged file")
        weights, digest = str(config.get("weights")), str(config.get("sha256"))
        if not re.fullmatch(WEIGHTS_NAME, weights) or weights_name(digest) != weights:
            accepted = "the name and SHA-256 of a weights file in the same folder"
            raise CheckpointError(str(path), f"{weights:.60}, {digest:.70}", accepted)
        check_entries(path, config)
        return _from_version_1(config) if config["version"] == 1 else config


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
    if config["version"] == 1:
        tensors = _rename_tensors(tensors, plain_name)
        _find_packed_shapes(config, tensors)
    _check_owners(folder, config)
    _check_tensors(folder, config, tensors)
    return config, tensors


def rename(
    config: dict, tensors: dict[str, Tensor], new_name: Callable[[str], str]
) -> tuple[dict, dict[str, Tensor]]:
    """The same adapter with other names of layers and parameters."""
    return _rename_config(config, new_name), _rename_tensors(tensors, new_name)


def _rename_config(config: dict, new_name: Callable[[str], str]) -> dict:
    layers = {}
    for name, entry in config["layers"].items():
        owner = {"pair_of": new_name(entry["pair_of"])} if "pair_of" in entry else {}
        layers[new_name(name)] = entry | owner
    renamed = {
        "layers": layers,
        "base": {new_name(name): shape for name, shape in config["base"].items()},
        "saved": [new_name(name) for name in config["saved"]],
    }
    if "tied" in config:
        renamed["tied"] = {new_name(n): new_name(name) for n, name in config["tied"].items()}
    if config.get("selection") is not None:
        renamed["selection"] = rename_selection(config["selection"], new_name)
    return config | renamed


def rename_selection(selection: dict, new_name: Callable[[str], str]) -> dict:
    """A selection of DiffoRA, and the gates in it, with other names of the layers."""
    renamed = dict(selection)
    if isinstance(selection.get("layers"), dict):
        renamed["layers"] = {new_name(name): row for name, row in selection["layers"].items()}
    if isinstance(selection.get("gates"), dict):
        renamed["gates"] = rename_selection(selection["gates"], new_name)
    return renamed


def _rename_tensors(
    tensors: dict[str, Tensor], new_name: Callable[[str], str]
) -> dict[str, Tensor]:
    renamed = {}
    for name, t in tensors.items():
        of_layer = _OF_LAYER.fullmatch(name)
        if of_layer is not None:
            name = f"{new_name(of_layer[1])}.{of_layer[2]}"
        elif name.endswith(".saved"):
            name = new_name(name.removesuffix(".saved")) + ".saved"
        renamed[name] = t
    return renamed


# --------------------------------------------------------------------- version 1


def _from_version_1(config: dict) -> dict:
    """An object of version 1 in the form of version 2."""
    count = len(config["layers"]), len(config["base"])
    config = _rename_config(config, plain_name)
    if (len(config["layers"]), len(config["base"])) != count:
        raise CheckpointError("layers", "two of one plain name", "names that stay different")
    stored, base = config["base"], {}
    for name, entry in config["layers"].items():
        shape = stored[f"{name}.weight"]
        base[f"{name}.weight"] = shape[::-1] if entry.get("transposed") else shape
        if f"{name}.bias" in stored:
            base[f"{name}.bias"] = stored[f"{name}.bias"]
    base |= {name: stored[name] for name in config["saved"]}
    return {**config, "base": base}


def _find_packed_shapes(config: dict, tensors: dict[str, Tensor]) -> None:
    """Give layers whose weight was stored as bytes in one column the shape that their pair fits."""
    for name, entry in config["layers"].items():
        owner, shape = pair_owner(name, entry), config["base"][f"{name}.weight"]
        pair = tensors.get(f"{owner}.lora_A"), tensors.get(f"{owner}.lora_B")
        if shape[1:] == [1] and pair[0] is not None and pair[1] is not None:
            config["base"][f"{name}.weight"] = [pair[1].shape[0], pair[0].shape[-1]]


# ------------------------------------------------------------------- what must fit


def check_base(folder: str | os.PathLike, config: dict, here: dict[str, list[int]]) -> None:
    """Raise CheckpointError unless ``here``, of a model, has the shapes of the adapter's base."""
    saved = config["base"]
    differ = sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n))
    if not differ:
        return
    name, more = differ[0], f" ({len(differ)} weights differ)" if len(differ) > 1 else ""
    given = f"an adapter for another base model: {name} is {saved.get(name)} there"
    raise CheckpointError(str(folder), given, f"{here.get(name)} as in this model{more}")


def _check_owners(folder: str | os.PathLike, config: dict) -> None:
    """A pair must be stored under the name of a layer that it fits, and that owns its pair."""
    base = config["base"]
    kinds = {
        name: (pair_owner(name, c) == name, c["r"], base[f"{name}.weight"])
        for name, c in config["layers"].items()
    }
    for name, c in config["layers"].items():
        owner = pair_owner(name, c)
        if kinds.get(owner) != (True, *kinds[name][1:]):
            accepted = "the pair of a layer of the same shape"
            raise CheckpointError(str(folder), f"{name} with the pair of {owner}", accepted)


def _check_tensors(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    """The tensors must have the names and shapes that the JSON tells, and hold numbers."""
    expected = {f"{name}.saved": config["base"][name] for name in config["saved"]}
    for name, c in config["layers"].items():
        (n, k), r = config["base"][f"{name}.weight"], c["r"]
        owns, started = pair_owner(name, c) == name, c["update_ratio"] is not None
        for stem, stored in (("lora", owns), ("anchor", started)):
            if stored:
                expected |= {f"{name}.{stem}_A": [r, k], f"{name}.{stem}_B": [n, r]}
        if c.get("gate"):
            expected[f"{name}.gate"] = c["gate"]["shape"]
        if c["folded"] > len(tensors):
            given = f"{c['folded']} past updates of {name}"
            raise CheckpointError(str(folder), given, f"at most {len(tensors)}, as many tensors")
        for i in range(c["folded"]):  # of any rank, but the same for both factors
            rank = tensors.get(f"{name}.folded_A.{i}", torch.empty(0)).shape[:1]
            expected |= {f"{name}.folded_A.{i}": [*rank, k], f"{name}.folded_B.{i}": [n, *rank]}
    found = {name: list(t.shape) for name, t in tensors.items()}
    differ = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if differ:
        name = differ[0]
        given = f"tensor {name} of shape {found.get(name)}"
        raise CheckpointError(str(folder), given, f"shape {expected.get(name)}")
    for name, t in tensors.items():
        if not (t.is_floating_point() or name.endswith(".saved")) or t.is_complex():
            raise CheckpointError(str(folder), f"tensor {name} of {t.dtype}", "real numbers")
