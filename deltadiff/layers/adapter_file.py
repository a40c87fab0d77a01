"""`save_adapter` and `load_adapter`: an adapter is one JSON file and one safetensors file.

    adapter.json                 what it is, for which base model, name and SHA-256 of the other
    adapter-<sha>.safetensors    the tensors

The weights file carries its hash in its name and the JSON is renamed into place last, so that a
crash at any moment leaves the old adapter or the new one. Nothing is pickled. The update that
Delta-LoRA wrote into W is stored as the factors that tell it (see `lora`), so the adapter stays
adapter-sized and the base weights are never in it.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..diffora.gates import Selection
from ..errors import CheckpointError, SwapError
from ..files import write_bytes
from .lora_linear import LoraLinear, lora_layers
from .pending_delta import LowRankFactors, PendingDelta
from .report import SwapReport, swap_report
from .swap import SELECTION, swap_

FORMAT = "deltadiff-adapter"


VERSION = 1


CONFIG = "adapter.json"


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the low-rank pairs, what Delta-LoRA has added, and other trainable parameters.

    A pair that layers share is written once. DiffoRA's selection and gates go with the adapter.

    Args:
        model: a swapped model.
        folder: made where it is missing; an adapter in it is replaced, atomically.

    Returns:
        The path of ``adapter.json``.

    Raises:
        SwapError: no swapped layer; or lambda changed so often that the update of W cannot be told
            by factors any more (`merge_` and save the model then).
    """
    layers = lora_layers(model)
    if not layers:
        raise SwapError("model", "a model without swapped layers", "a model that `swap_` changed")
    tensors: dict[str, Tensor] = {}
    described, owners = {}, _owners(layers)
    for name, layer in layers.items():
        described[_plain(name)] = _describe(name, layer, owners[_plain(name)], tensors)
    extra = _extra(model)
    tensors |= {f"{name}.saved": p for name, p in extra.items()}
    blob = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    config = {
        "format": FORMAT,
        "version": VERSION,
        "weights": f"adapter-{digest[:16]}.safetensors",
        "sha256": digest,
        "fingerprint": _fingerprint(_base_shapes(model)),
        "base": _base_shapes(model),
        "layers": described,
        "saved": sorted(extra),
    }
    if SELECTION in model.__dict__:
        config["selection"] = model.__dict__[SELECTION].to_json()
    config["checksum"] = _checksum(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / config["weights"], blob)
    write_bytes(folder / CONFIG, json.dumps(config, indent=1).encode())
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != config["weights"]:
            old.unlink(missing_ok=True)
    return folder / CONFIG


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, *, backend: str | None = None
) -> SwapReport:
    """Put a saved adapter on its base model; an eager model is swapped first.

    W is not written: what in-place Delta-LoRA had added to it is applied in the forward pass, until
    `merge_` or further in-place training folds it in. A model that is swapped already keeps its own
    ``lora_dropout``.

    Args:
        model: the base model, eager or swapped with the same layers and ranks.
        folder: what `save_adapter` wrote.
        backend: as for `swap_`, where the model is swapped here.

    Raises:
        CheckpointError: a file is missing, truncated, garbled or foreign, or was made for a base
            model with other names or shapes; nothing was changed.
        SwapError: the model is swapped with other layers or gates, or its W was already updated.
    """
    config, tensors = _read(Path(folder))
    _check_base(folder, config, _base_shapes(model))
    layers = {_plain(name): layer for name, layer in lora_layers(model).items()}
    parameters = {_plain(name): p for name, p in model.named_parameters()}
    _check_tensors(folder, config, tensors)
    selection = Selection.from_json(config["selection"]) if config.get("selection") else None
    if layers:
        _check_layers(layers, config["layers"])
    else:
        kinds: dict[tuple, set[str]] = {}
        for name, c in config["layers"].items():
            kinds.setdefault((c["r"], c.get("lora_dropout", 0.0)), set()).add(name)
        for (r, dropout), names in kinds.items():
            swap_(
                model, r=r, lora_dropout=dropout, backend=backend,
                target_modules=lambda name, _, names=names: _plain(name) in names,
            )  # fmt: skip
        layers = {_plain(name): layer for name, layer in lora_layers(model).items()}
    for name, layer in layers.items():
        entry = config["layers"][name]
        owner, layer.share_group = layers[_owner(name, entry)], entry.get("share_group")
        layer.lora_A, layer.lora_B = owner.lora_A, owner.lora_B
    if selection is not None:
        model.__dict__[SELECTION] = selection
    for name, layer in layers.items():
        _fill(layer, config["layers"][name], name, tensors)
    with torch.no_grad():
        for name in config["saved"]:
            parameters[name].copy_(tensors[f"{name}.saved"])
            parameters[name].requires_grad_(True)
    return swap_report(model)


# ----------------------------------------------------------------------- writing


def _owners(layers: dict[str, LoraLinear]) -> dict[str, str]:
    """For each layer the one whose name its pair is stored under: layers may share one."""
    first: dict[Tensor, str] = {}
    return {
        _plain(name): first.setdefault(layer.lora_A, _plain(name)) for name, layer in layers.items()
    }


def _owner(name: str, entry: dict) -> str:
    return entry.get("pair_of", name)


def _describe(name: str, layer: LoraLinear, owner: str, tensors: dict[str, Tensor]) -> dict:
    """The JSON entry of a layer; adds the layer's tensors to ``tensors``."""
    plain, delta = _plain(name), layer.delta
    if owner == plain:
        tensors |= {f"{plain}.lora_A": layer.lora_A, f"{plain}.lora_B": layer.lora_B}
    entry = {
        "r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": layer.scaling,
        "lora_dropout": layer.lora_dropout, "update_ratio": None, "folded": 0,
        "transposed": layer.transposed,
    }  # fmt: skip
    entry |= {} if owner == plain else {"pair_of": owner}
    entry |= {} if layer.share_group is None else {"share_group": layer.share_group}
    if layer.gate is not None:
        tensors[f"{plain}.gate"] = layer.gate.detach().clone()  # layers may share one
        entry["gate"] = _describe_gate(layer)
    if delta is None:
        return entry
    if delta.past_updates is None:
        given = "an update of W under too many values of update_ratio to be told by factors"
        raise SwapError(name, given, "`merge_`, then save the whole model")
    if delta.started():
        entry["update_ratio"] = delta.update_ratio
        tensors |= {f"{plain}.anchor_A": delta.anchor_A, f"{plain}.anchor_B": delta.anchor_B}
    entry["folded"] = len(delta.past_updates)
    for i, product in enumerate(delta.past_updates):
        tensors |= {f"{plain}.folded_A.{i}": product.A, f"{plain}.folded_B.{i}": product.B}
    return entry


def _describe_gate(layer: LoraLinear) -> dict | None:
    gate = layer.gate
    trained = isinstance(gate, nn.Parameter)
    return None if gate is None else {"shape": list(gate.shape), "trained": trained}


# ----------------------------------------------------------------------- reading


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(str(path), error, "a file that save_adapter wrote") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        given = f"format {config.get('format')!r}" if isinstance(config, dict) else "no JSON object"
        raise CheckpointError(str(path), given, f"format {FORMAT!r}")
    if config.get("version") != VERSION:
        raise CheckpointError(str(path), f"version {config.get('version')}", f"version {VERSION}")
    if config.pop("checksum", None) != _checksum(config):
        raise CheckpointError(str(path), "another checksum (changed by hand?)", "an unchanged file")
    if not re.fullmatch(r"adapter-[0-9a-f]{16}\.safetensors", str(config["weights"])):
        raise CheckpointError(str(path), config["weights"], "a weights file in the same folder")
    path = folder / config["weights"]
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), error, "the weights that adapter.json names") from None
    if hashlib.sha256(blob).hexdigest() != config["sha256"]:
        given = f"{len(blob)} bytes with another SHA-256 (truncated or changed)"
        raise CheckpointError(str(path), given, f"SHA-256 {config['sha256']}")
    try:
        return config, load(blob)
    except SafetensorError as error:
        raise CheckpointError(str(path), error, "a safetensors file") from None


def _check_base(folder, config: dict, here: dict) -> None:
    if config["fingerprint"] == _fingerprint(here):
        return
    saved = config["base"]
    differ = sorted(n for n in saved.keys() | here.keys() if saved.get(n) != here.get(n))
    name, more = differ[0], f" ({len(differ)} weights differ)" if len(differ) > 1 else ""
    given = f"an adapter for another base model: {name} is {saved.get(name)} there"
    raise CheckpointError(str(folder), given, f"{here.get(name)} as in this model{more}")


def _check_tensors(folder, config: dict, tensors: dict) -> None:
    _check_owners(folder, config)
    expected = {f"{name}.saved": config["base"][name] for name in config["saved"]}
    for name, c in config["layers"].items():
        n, k = config["base"][f"{name}.weight"][:: -1 if c.get("transposed") else 1]
        r = c["r"]
        owner = _owner(name, c)
        pair = {"lora": (r, owner == name), "anchor": (r, c["update_ratio"] is not None)}
        for stem, (rank, there) in pair.items():
            if there:
                expected |= {f"{name}.{stem}_A": [rank, k], f"{name}.{stem}_B": [n, rank]}
        if c.get("gate"):
            expected[f"{name}.gate"] = c["gate"]["shape"]
        for i in range(c["folded"]):
            rank = tensors.get(f"{name}.folded_A.{i}", torch.empty(0)).shape[0]
            expected |= {f"{name}.folded_A.{i}": [rank, k], f"{name}.folded_B.{i}": [n, rank]}
    given = {name: list(t.shape) for name, t in tensors.items()}
    differ = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
    if differ:
        name = differ[0]
        raise CheckpointError(
            str(folder), f"tensor {name} of shape {given.get(name)}", f"shape {expected.get(name)}"
        )


def _check_owners(folder, config: dict) -> None:
    """A pair is stored under the name of a layer that it fits, and that stores its own."""
    base = config["base"]
    kinds = {
        name: (_owner(name, c) == name, c["r"], c.get("transposed"), base[f"{name}.weight"])
        for name, c in config["layers"].items()
    }
    for name, c in config["layers"].items():
        owner = _owner(name, c)
        if kinds.get(owner) != (True, *kinds[name][1:]):
            accepted = "the pair of a layer of the same shape"
            raise CheckpointError(str(folder), f"{name} with the pair of {owner}", accepted)


def _check_layers(layers: dict[str, LoraLinear], saved: dict) -> None:
    here = {name: layer.r for name, layer in layers.items()}
    there = {name: c["r"] for name, c in saved.items()}
    if here != there:
        name = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))[0]
        given = f"rank {here.get(name)} (None: not swapped)"
        raise SwapError(name, given, f"rank {there.get(name)}, as in the adapter")
    for name, owner in _owners(layers).items():
        stored = _owner(name, saved[name])
        if owner != stored:
            raise SwapError(name, f"the pair of {owner}", f"that of {stored}, as in the adapter")
    for name, layer in layers.items():
        delta = layer.delta
        if delta is not None and delta.in_weight and delta.started():
            raise SwapError(name, "a weight that was already updated in place", "the base weight")
        gates = _describe_gate(layer), saved[name].get("gate")
        if gates[0] and gates[0] != gates[1]:
            raise SwapError(name, f"gate {gates[0]}", f"{gates[1]}, as in the adapter")


@torch.no_grad()
def _fill(layer: LoraLinear, entry: dict, name: str, tensors: dict[str, Tensor]) -> None:
    owner = _owner(name, entry)
    layer.lora_A.copy_(tensors[f"{owner}.lora_A"])
    layer.lora_B.copy_(tensors[f"{owner}.lora_B"])
    layer.scaling = entry["scaling"]
    layer.lora_alpha = entry.get("lora_alpha", layer.scaling * layer.r)  # older ones have none
    layer.delta = None
    if entry.get("gate"):
        _fill_gate(layer, entry["gate"]["trained"], tensors[f"{name}.gate"])
    ratio, device = entry["update_ratio"], layer.lora_A.device
    if ratio is None and not entry["folded"]:
        return
    anchors = [torch.zeros_like(p.detach()) for p in (layer.lora_A, layer.lora_B)]
    if ratio is not None:
        anchors[0].copy_(tensors[f"{name}.anchor_A"])
        anchors[1].copy_(tensors[f"{name}.anchor_B"])
    scale = PendingDelta.make_rank_scale(ratio or 0.0, layer.r, layer.lora_A, ratio is not None)
    folded = [
        LowRankFactors(
            tensors[f"{name}.folded_B.{i}"].to(device), tensors[f"{name}.folded_A.{i}"].to(device),
            in_weight=False,
        )
        for i in range(entry["folded"])
    ]  # fmt: skip
    layer.delta = PendingDelta(*anchors, ratio or 0.0, scale, in_weight=False, past_updates=folded)


def _fill_gate(layer: LoraLinear, trained: bool, gate: Tensor) -> None:
    if layer.gate is not None:  # an optimizer or other layers may hold this very tensor
        layer.gate.copy_(gate)
        return
    gate = gate.to(layer.lora_A.device)
    layer.gate = nn.Parameter(gate) if trained else gate


# ------------------------------------------------------------------- names and shapes


def _plain(name: str) -> str:
    """The name of a module or parameter as it is without PEFT's wrappers."""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)


def _extra(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters that are no low-rank pair: heads and the like."""
    own = {id(p) for m in lora_layers(model).values() for p in m.adapter}
    named = model.named_parameters()
    return {_plain(n): p for n, p in named if p.requires_grad and id(p) not in own}


def _base_shapes(model: nn.Module) -> dict[str, list[int]]:
    own = {id(p) for m in lora_layers(model).values() for p in m.adapter}
    return {
        _plain(name): list(p.shape)
        for name, p in model.named_parameters()
        if id(p) not in own and ".original_module." not in name
    }


def _fingerprint(shapes: dict[str, list[int]]) -> str:
    """Of the names and shapes of the base weights."""
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()


def _checksum(config: dict) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
