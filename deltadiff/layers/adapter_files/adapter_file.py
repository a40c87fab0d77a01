"""`save_adapter` and `load_adapter`: what was trained, without the base weights.

`format.py` describes the two files. The weights file carries its hash in its name and the JSON
file is written last, so that a crash at any moment leaves the old adapter or the new one. Nothing
is pickled. The update that Delta-LoRA wrote into W is stored as the factors that it telescopes to
(see `pending_delta`), so the file has the size of the adapter, not of the model.

An adapter fits every base model whose layers have its names and sizes: under another wrapper, with
its weights stored otherwise, beside another head, with more tokens.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from warnings import warn

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ...checks import DTYPES, wide_dtype
from ...errors import ArgumentError, ArgumentTypeError, SwapError
from ...files import (
    as_folder,
    remove_leftovers,
    sha256_of_json,
    write_bytes,
    write_text,
)
from ...ranks import Ranks, check_not_partitioned, copy_values, is_sharded, reshard, whole
from ..linear import is_peft_model
from ..lora_linear import LoraLinear, own_layers
from ..low_rank_factors import LowRankFactors
from ..low_rank_sum import check_known
from ..model_notes import note_selection, noted_selection
from ..peft_files.load import load_peft
from ..peft_files.read import is_peft_folder
from ..pending_delta import PendingDelta
from ..plain_names import by_plain_name, held_tensors, plain_name, rename_to_fit
from ..report import SwapReport, swap_report
from ..rounded import rounding_note
from ..saturation import warn_saturated
from . import format as adapter_format
from .base import (
    base_shapes,
    check_saved,
    linear_modules,
    swap_as_saved,
    trained_beside,
    turn_saved,
)
from .format import (
    WEIGHTS_NAME,
    check_base,
    pair_owner,
    read_adapter,
    rename,
    rename_selection,
)


def save_adapter(model: nn.Module, folder: str | os.PathLike) -> Path:
    """Write the low-rank pairs, what Delta-LoRA has added, and other trainable parameters.

    Of a model that FSDP shards, all processes call this, and the first one writes.

    A pair that several layers share is written once. DiffoRA's selection and gates are saved too,
    and so are the buffers beside a trained parameter, such as the running mean of a batch norm.

    A 16-bit W that was updated in place with rounding "nearest" or "stochastic" is not quite the
    sum of the updates, which the file holds; a warning says so.

    Args:
        model: a swapped model, also inside of DistributedDataParallel or torch.compile, whose
            names are left out.
        folder: made where it is missing; an adapter in it is replaced, atomically. Files that
            `save_adapter` did not write stay.

    Returns:
        The path of ``adapter.json``.

    Raises:
        ArgumentTypeError, ArgumentError: ``model`` is no module; ``folder`` is no path, or empty,
            or holds an ``adapter.json`` of something else; nothing was written.
        SwapError: the model has no swapped layer, or has layers of PEFT; or lambda changed so often
            that the update of W is not kept as factors any more (call `merge_` and save the whole
            model instead).
    """
    _check_module("save_adapter", model)
    folder = as_folder("folder", folder)
    path = folder / adapter_format.CONFIG_FILE
    if os.path.lexists(path) and not adapter_format.is_config_file(path):
        given = f"{folder}, which holds an {path.name} that `save_adapter` did not write"
        raise ArgumentError("folder", given, "another folder")
    instead = "`model.save_pretrained`, or `export_peft` after Delta-LoRA"
    layers = by_plain_name(own_layers(model, "save_adapter", instead).items())
    sharded = reshard(model)
    warn_saturated(layers)
    tensors: dict[str, Tensor] = {}
    owners = _owners(layers)
    entries = {name: _describe(name, m, owners[name], tensors) for name, m in layers.items()}
    extra, tied = trained_beside(model, layers)
    tensors |= {f"{name}.saved": held.logical for name, held in extra.items()}
    blob = save({name: whole(t).cpu().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    weights = adapter_format.weights_name(digest)
    config: dict[str, object] = {
        "format": adapter_format.FORMAT,
        "version": adapter_format.VERSION,
        "weights": weights,
        "sha256": digest,
        "base": base_shapes(layers, layers, extra),
        "layers": entries,
        "saved": sorted(extra),
    }
    config |= {"tied": tied} if tied else {}
    selection = noted_selection(model)
    if selection is not None:
        config["selection"] = rename_selection(selection, plain_name)
    config["checksum"] = sha256_of_json(config)
    if note := rounding_note({name: [layer] for name, layer in layers.items()}):
        warn(note, stacklevel=2)
    ranks = Ranks() if sharded else None
    if ranks is None or ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / weights, blob)
        write_text(path, json.dumps(config, indent=1))
        _remove_earlier(folder, weights)
    if ranks is not None:
        ranks.wait()  # after this call the file is there for all
    return path


def load_adapter(
    model: nn.Module, folder: str | os.PathLike, *, backend: str | None = None
) -> SwapReport:
    """Put a saved adapter on its base model; an eager model is swapped first.

    The base may store its weights otherwise than the one that was trained (NF4, bfloat16, float32),
    be wrapped, have another head and more tokens. What it needs are the layers that were swapped
    and the parameters that were trained beside them, of the same names and sizes.

    W is not written: the forward pass adds what Delta-LoRA had added to W in place, until `merge_`
    or further training in place writes it into W. A model that is swapped already keeps its own
    ``lora_dropout``. PEFT's plain LoRA adapters are read too, for an eager model: `read_peft` says
    what of theirs is refused.

    Args:
        model: the base model, eager or swapped with the same layers and ranks. One that
            DistributedDataParallel is to train gets its adapter before it is wrapped.
        folder: the folder that `save_adapter`, `export_peft` or PEFT wrote to.
        backend: as for `swap_`; only used for an eager model.

    Returns:
        A report of the layers, their paths and the reasons; it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: ``model`` is no module, or ``folder`` no path, or empty;
            nothing was changed.
        CheckpointError: a file is missing, truncated, garbled or foreign, or was made for a base
            model with other names or shapes; nothing was changed.
        SwapError: the model is swapped with other layers or gates, or its W was already updated, or
            it has layers of PEFT; nothing was changed.
    """
    _check_module("load_adapter", model)
    if is_peft_folder(folder):
        return load_peft(model, folder, backend)
    config, tensors = read_adapter(folder)
    if is_peft_model(model):
        given = "a model with PEFT's layers, which hold their own adapters"
        raise SwapError("load_adapter", given, "the base model")
    linear, held = linear_modules(model), held_tensors(model)
    lost, added = rename_to_fit(model, config["layers"], linear)
    if lost or added:
        config, tensors = rename(config, tensors, lambda n: added + n.removeprefix(lost))
    if config["version"] == 1:
        turn_saved(config, tensors, held)
    names = config["layers"], {n: held[n] for n in config["saved"] if n in held}
    check_base(folder, config, base_shapes(linear, *names))
    check_saved(folder, config, tensors, held)
    layers = by_plain_name((n, m) for n, m in linear.items() if isinstance(m, LoraLinear))
    if layers:
        _check_layers(layers, config["layers"])
    else:
        swap_as_saved(model, folder, config["layers"], backend)
        swapped = linear_modules(model)
        layers = {n: m for n, m in swapped.items() if isinstance(m, LoraLinear)}
    first: dict[str, LoraLinear] = {}  # of the layers that share a pair, by the name of the pair
    for name, layer in layers.items():
        entry = config["layers"][name]
        owner = first.setdefault(pair_owner(name, entry), layer)
        layer.share_pair(owner, entry.get("share_group"))
    if config.get("selection") is not None:
        note_selection(model, config["selection"])
    for name, layer in layers.items():
        _fill(layer, config["layers"][name], name, tensors)
    with torch.no_grad():
        for name in config["saved"]:
            copy_values(held[name].logical, tensors[f"{name}.saved"])
            if isinstance(held[name].tensor, nn.Parameter):
                held[name].tensor.requires_grad_(True)
    return swap_report(model)


def _check_module(call: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    check_not_partitioned(call, model)


# ----------------------------------------------------------------------- writing


def _owners(layers: Mapping[str, LoraLinear]) -> dict[str, str]:
    """For each layer the first one that holds the same pair, which is stored under that name."""
    first: dict[Tensor, str] = {}
    return {name: first.setdefault(layer.lora_A, name) for name, layer in layers.items()}


def _describe(name: str, layer: LoraLinear, owner: str, tensors: dict[str, Tensor]) -> dict:
    """The JSON object of a layer; adds the layer's tensors to ``tensors``."""
    delta = layer.delta
    if owner == name:
        tensors |= {f"{name}.lora_A": layer.lora_A, f"{name}.lora_B": layer.lora_B}
    entry: dict[str, object] = {
        "r": layer.r, "lora_alpha": layer.lora_alpha, "scaling": layer.scaling,
        "lora_dropout": layer.lora_dropout, "update_ratio": None, "folded": 0,
    }  # fmt: skip
    entry |= {} if owner == name else {"pair_of": owner}
    entry |= {} if layer.share_group is None else {"share_group": layer.share_group}
    if layer.gate is not None:
        # safetensors refuses tensors that share memory, as the gates of several layers may.
        tensors[f"{name}.gate"] = layer.gate.detach().clone()
        entry["gate"] = _describe_gate(layer)
    if delta is None:
        return entry
    check_known(name, delta)
    past = list(delta.past_updates or ())
    moved = delta.differs(layer.lora_A, layer.lora_B)
    if delta.started() and delta.scaling == layer.scaling and not moved:
        entry["update_ratio"] = delta.update_ratio
        tensors |= {f"{name}.anchor_A": delta.anchor_A, f"{name}.anchor_B": delta.anchor_B}
    elif delta.started():  # an update has the scaling and the pair of the entry
        past.append(delta.product())
    entry["folded"] = len(past)
    for i, product in enumerate(past):
        tensors |= {f"{name}.folded_A.{i}": product.A, f"{name}.folded_B.{i}": product.B}
    return entry


def _describe_gate(layer: LoraLinear) -> dict | None:
    gate = layer.gate
    trained = isinstance(gate, nn.Parameter)
    return None if gate is None else {"shape": list(gate.shape), "trained": trained}


def _remove_earlier(folder: Path, weights: str) -> None:
    """Remove the weights that no JSON file names any more, and what killed calls have left."""
    for old in folder.glob("adapter-*.safetensors"):
        if old.name != weights and adapter_format.is_weights_file(old):
            old.unlink(missing_ok=True)
    remove_leftovers(folder, rf"{re.escape(adapter_format.CONFIG_FILE)}|{WEIGHTS_NAME}")


# ----------------------------------------------------------------------- reading


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
        if saved_gate and saved_gate["trained"] and not gate and is_sharded(layer.lora_A):
            accepted = "`load_adapter` on the whole model, then `fully_shard`"
            raise SwapError(name, "a sharded layer without the gate of the adapter", accepted)
        if gate and gate != saved_gate:
            raise SwapError(name, f"gate {gate}", f"{saved_gate}, as in the adapter")


@torch.no_grad()
def _fill(layer: LoraLinear, entry: dict, name: str, tensors: dict[str, Tensor]) -> None:
    """Give a layer the tensors and numbers of its entry."""
    owner = pair_owner(name, entry)
    copy_values(layer.lora_A, tensors[f"{owner}.lora_A"])
    copy_values(layer.lora_B, tensors[f"{owner}.lora_B"])
    layer.scaling = float(entry["scaling"])  # an int of JSON may be too long for a kernel
    layer.lora_alpha = entry.get("lora_alpha", layer.scaling * layer.r)  # older files have none
    layer.delta = None
    if entry.get("gate"):
        _fill_gate(layer, entry["gate"]["trained"], tensors[f"{name}.gate"])
    started, device = entry["update_ratio"] is not None, layer.lora_A.device
    if not started and not entry["folded"]:
        return
    ratio = float(entry["update_ratio"] or 0)
    anchor_A = torch.zeros_like(layer.lora_A.detach())
    anchor_B = torch.zeros_like(layer.lora_B.detach())
    if started:
        copy_values(anchor_A, tensors[f"{name}.anchor_A"])
        copy_values(anchor_B, tensors[f"{name}.anchor_B"])
    scale = PendingDelta.make_rank_scale(ratio, layer.r, layer.lora_A, started)

    def past_update(i: int) -> LowRankFactors:
        """The factors of a past update in one dtype, whatever the file has: they are multiplied."""
        b, a = (tensors[f"{name}.folded_{letter}.{i}"].to(device) for letter in "BA")
        dtype = (
            torch.float64 if torch.float64 in (b.dtype, a.dtype) else wide_dtype(layer.lora_A.dtype)
        )
        return LowRankFactors(b.to(dtype), a.to(dtype), in_weight=False)

    folded = [past_update(i) for i in range(entry["folded"])]
    layer.delta = PendingDelta(
        anchor_A,
        anchor_B,
        layer.lora_A.detach().clone(),
        layer.lora_B.detach().clone(),
        ratio,
        layer.scaling,
        scale,
        in_weight=False,
        past_updates=folded,
    )
    layer.delta.follow_shards(layer.lora_A, layer.lora_B)


def _fill_gate(layer: LoraLinear, trained: bool, gate: Tensor) -> None:
    if layer.gate is not None:  # an optimizer or other layers may hold the same tensor
        copy_values(layer.gate, gate)
        return
    if trained:
        layer.gate = nn.Parameter(gate.to(layer.lora_A))  # it is trained as the pair is
        return
    gate = gate.to(layer.lora_A.device)
    layer.gate = gate if gate.dtype in DTYPES else gate.to(wide_dtype(layer.lora_A.dtype))
