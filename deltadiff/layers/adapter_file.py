"""`save_adapter` and `load_adapter`: what was trained, without the base weights.

`adapter_format` describes the two files. The weights file carries its hash in its name and the JSON
file is written last, so that a crash at any moment leaves the old adapter or the new one. Nothing
is pickled. The update that Delta-LoRA wrote into W is stored as the factors that it telescopes to
(see `pending_delta`), so the file has the size of the adapter, not of the model.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import SwapError
from ..files import as_folder, write_bytes, write_text
from . import adapter_format
from .adapter_format import check_base, pair_owner, plain_name, read_adapter, sha256_of_json
from .load_peft import load_peft
from .lora_layers import lora_layers
from .lora_linear import LoraLinear, own_layers
from .model_notes import note_selection, noted_selection
from .pending_delta import LowRankFactors, PendingDelta
from .read_peft import is_peft_folder
from .report import SwapReport, swap_report
from .swap import swap_


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the low-rank pairs, what Delta-LoRA has added, and other trainable parameters.

    A pair that several layers share is written once. DiffoRA's selection and gates are saved too.

    Args:
        model: a swapped model.
        folder: made where it is missing; an adapter in it is replaced, atomically. Files that
            `save_adapter` did not write stay.

    Returns:
        The path of ``adapter.json``.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty; nothing was written.
        SwapError: the model has no swapped layer; or lambda changed so often that the update of W
            is not kept as factors any more (call `merge_` and save the whole model instead).
    """
    folder = as_folder("folder", folder)
    instead = "`model.save_pretrained`, or `export_peft` after Delta-LoRA"
    layers = own_layers(model, "save_adapter", instead)
    tensors: dict[str, Tensor] = {}
    entries, owners = {}, _owners(layers)
    for name, layer in layers.items():
        plain = plain_name(name)
        entries[plain] = _describe(name, layer, owners[plain], tensors)
    extra = _other_trained(model)
    tensors |= {f"{name}.saved": p for name, p in extra.items()}
    blob = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    weights = adapter_format.weights_name(digest)
    config: dict[str, object] = {
        "format": adapter_format.FORMAT,
        "version": adapter_format.VERSION,
        "weights": weights,
        "sha256": digest,
        "fingerprint": sha256_of_json(_base_shapes(model)),
        "base": _base_shapes(model),
        "layers": entries,
        "saved": sorted(extra),
    }
    selection = noted_selection(model)
    if selection is not None:
        config["selection"] = selection
    config["checksum"] = sha256_of_json(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / adapter_format.CONFIG_FILE
    write_bytes(folder / weights, blob)
    write_text(path, json.dumps(config, indent=1))
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != weights and adapter_format.is_weights_file(old):
            old.unlink(missing_ok=True)
    return path


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, *, backend: str | None = None
) -> SwapReport:
    """Put a saved adapter on its base model; an eager model is swapped first.

    W is not written: the forward pass adds what Delta-LoRA had added to W in place, until `merge_`
    or further training in place writes it into W. A model that is swapped already keeps its own
    ``lora_dropout``. PEFT's plain LoRA adapters are read too, for an eager model: `read_peft` says
    what of theirs is refused.

    Args:
        model: the base model, eager or swapped with the same layers and ranks.
        folder: the folder that `save_adapter`, `export_peft` or PEFT wrote to.
        backend: as for `swap_`; only used for an eager model.

    Returns:
        A report of the layers, their paths and the reasons; it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty; nothing was changed.
        CheckpointError: a file is missing, truncated, garbled or foreign, or was made for a base
            model with other names or shapes; nothing was changed.
        SwapError: the model is swapped with other layers or gates, or its W was already updated.
    """
    if is_peft_folder(folder):
        return load_peft(model, folder, backend)
    config, tensors = read_adapter(folder)
    check_base(folder, config, _base_shapes(model))
    layers = {plain_name(name): layer for name, layer in lora_layers(model).items()}
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    if layers:
        _check_layers(layers, config["layers"])
    else:
        _swap_as_saved(model, config["layers"], backend)
        layers = {plain_name(name): layer for name, layer in lora_layers(model).items()}
    for name, layer in layers.items():
        entry = config["layers"][name]
        owner, layer.share_group = layers[pair_owner(name, entry)], entry.get("share_group")
        layer.lora_A, layer.lora_B = owner.lora_A, owner.lora_B
    if config.get("selection") is not None:
        note_selection(model, config["selection"])
    for name, layer in layers.items():
        _fill(layer, config["layers"][name], name, tensors)
    with torch.no_grad():
        for name in config["saved"]:
            parameters[name].copy_(tensors[f"{name}.saved"])
            parameters[name].requires_grad_(True)
    return swap_report(model)


# ----------------------------------------------------------------------- writing


def _owners(layers: dict[str, LoraLinear]) -> dict[str, str]:
    """For each layer the first one that holds the same pair, which is stored under that name."""
    first: dict[Tensor, str] = {}
    plain = {plain_name(name): layer for name, layer in layers.items()}
    return {name: first.setdefault(layer.lora_A, name) for name, layer in plain.items()}


def _describe(name: str, layer: LoraLinear, owner: str, tensors: dict[str, Tensor]) -> dict:
    """The JSON object of a layer; adds the layer's tensors to ``tensors``."""
    plain, delta = plain_name(name), layer.delta
    if owner == plain:
        tensors |= {f"{plain}.lora_A": layer.lora_A, f"{plain}.lora_B": layer.lora_B}
    entry: dict[str, object] = {
        "r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": layer.scaling,
        "lora_dropout": layer.lora_dropout, "update_ratio": None, "folded": 0,
        "transposed": layer.transposed,
    }  # fmt: skip
    entry |= {} if owner == plain else {"pair_of": owner}
    entry |= {} if layer.share_group is None else {"share_group": layer.share_group}
    if layer.gate is not None:
        # safetensors refuses tensors that share memory, as the gates of several layers may.
        tensors[f"{plain}.gate"] = layer.gate.detach().clone()
        entry["gate"] = _describe_gate(layer)
    if delta is None:
        return entry
    if delta.past_updates is None:
        given = "an update of W under too many values of update_ratio to be kept as factors"
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


def _swap_as_saved(model: nn.Module, entries: dict[str, dict], backend: str | None) -> None:
    """Swap the layers of an adapter, with a call for each combination of rank and dropout."""
    groups: dict[tuple, set[str]] = {}
    for name, c in entries.items():
        groups.setdefault((c["r"], c.get("lora_dropout", 0.0)), set()).add(name)
    for (r, dropout), names in groups.items():
        swap_(
            model, r=r, lora_dropout=dropout, backend=backend,
            target_modules=_named(names),
        )  # fmt: skip


def _named(names: set[str]) -> Callable[[str, nn.Module], bool]:
    """A choice of ``target_modules`` by plain names."""
    return lambda name, _: plain_name(name) in names


def _check_layers(layers: dict[str, LoraLinear], saved: dict[str, dict]) -> None:
    """Raise SwapError unless the model is swapped as the adapter's was, and W is the base's."""
    here = {name: layer.r for name, layer in layers.items()}
    there = {name: c["r"] for name, c in saved.items()}
    if here != there:
        name = sorted(n for n in here.keys() | there.keys() if here.get(n) != there.get(n))[0]
        given = f"rank {here.get(name)} (None: not swapped)"
        raise SwapError(name, given, f"rank {there.get(name)}, as in the adapter")
    for name, owner in _owners(layers).items():
        stored = pair_owner(name, saved[name])
        if owner != stored:
            raise SwapError(name, f"the pair of {owner}", f"that of {stored}, as in the adapter")
    for name, layer in layers.items():
        delta = layer.delta
        if delta is not None and delta.in_weight and delta.started():
            raise SwapError(name, "a weight that was already updated in place", "the base weight")
        gate, saved_gate = _describe_gate(layer), saved[name].get("gate")
        if gate and gate != saved_gate:
            raise SwapError(name, f"gate {gate}", f"{saved_gate}, as in the adapter")


@torch.no_grad()
def _fill(layer: LoraLinear, entry: dict, name: str, tensors: dict[str, Tensor]) -> None:
    """Give a layer the tensors and numbers of its entry."""
    owner = pair_owner(name, entry)
    layer.lora_A.copy_(tensors[f"{owner}.lora_A"])
    layer.lora_B.copy_(tensors[f"{owner}.lora_B"])
    layer.scaling = entry["scaling"]
    layer.lora_alpha = entry.get("lora_alpha", layer.scaling * layer.r)  # older files have none
    layer.delta = None
    if entry.get("gate"):
        _fill_gate(layer, entry["gate"]["trained"], tensors[f"{name}.gate"])
    ratio, device = entry["update_ratio"], layer.lora_A.device
    if ratio is None and not entry["folded"]:
        return
    anchor_A = torch.zeros_like(layer.lora_A.detach())
    anchor_B = torch.zeros_like(layer.lora_B.detach())
    if ratio is not None:
        anchor_A.copy_(tensors[f"{name}.anchor_A"])
        anchor_B.copy_(tensors[f"{name}.anchor_B"])
    scale = PendingDelta.make_rank_scale(ratio or 0.0, layer.r, layer.lora_A, ratio is not None)
    folded = [
        LowRankFactors(
            tensors[f"{name}.folded_B.{i}"].to(device), tensors[f"{name}.folded_A.{i}"].to(device),
            in_weight=False,
        )
        for i in range(entry["folded"])
    ]  # fmt: skip
    layer.delta = PendingDelta(
        anchor_A, anchor_B, ratio or 0.0, scale, in_weight=False, past_updates=folded
    )


def _fill_gate(layer: LoraLinear, trained: bool, gate: Tensor) -> None:
    if layer.gate is not None:  # an optimizer or other layers may hold the same tensor
        layer.gate.copy_(gate)
        return
    gate = gate.to(layer.lora_A.device)
    layer.gate = nn.Parameter(gate) if trained else gate


# ------------------------------------------------------------------- parameters by name


def _adapter_ids(model: nn.Module) -> set[int]:
    return {id(p) for layer in lora_layers(model).values() for p in layer.adapter}


def _other_trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters that belong to no low-rank branch, such as a new head's."""
    own, named = _adapter_ids(model), model.named_parameters()
    return {plain_name(n): p for n, p in named if p.requires_grad and id(p) not in own}


def _base_shapes(model: nn.Module) -> dict[str, list[int]]:
    """The shape of each parameter of the base model by name."""
    own = _adapter_ids(model)
    return {
        plain_name(name): list(p.shape)
        for name, p in model.named_parameters()
        if id(p) not in own and ".original_module." not in name
    }
