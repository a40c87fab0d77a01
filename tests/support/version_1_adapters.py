"""Adapters as version 1 of the format has them, from before bases were known by (out, in)."""

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file, save
from torch import nn

from deltadiff import save_adapter
from deltadiff.layers.adapter_files.format import sha256_of_json, weights_name
from deltadiff.layers.lora_layers import lora_layers


def save_version_1(model: nn.Module, folder: Path, wrapper: str = "") -> None:
    """`save_adapter` as version 1 wrote it; ``wrapper`` comes before all names."""
    config = json.loads(save_adapter(model, folder).read_text())
    tensors = load_file(folder / config["weights"])
    (folder / config["weights"]).unlink()
    layers = lora_layers(model)
    pairs = {id(p) for layer in layers.values() for p in layer.adapter}
    held = (*model.named_parameters(), *model.named_buffers())
    named = {name: t for name, t in held if id(t) not in pairs}
    for name in config["saved"]:  # they lay as the base stores them
        tensors[f"{name}.saved"] = named[name].detach().contiguous()
    blob = save({wrapper + name: t for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    base = {wrapper + name: list(p.shape) for name, p in named.items()}
    entries = {}
    for name, entry in config["layers"].items():
        if "pair_of" in entry:
            entry["pair_of"] = wrapper + entry["pair_of"]
        entries[wrapper + name] = entry | {"transposed": layers[name].transposed}
    old = {
        "format": "deltadiff-adapter", "version": 1, "weights": weights_name(digest),
        "sha256": digest, "fingerprint": sha256_of_json(base), "base": base, "layers": entries,
        "saved": [wrapper + name for name in config["saved"]],
    }  # fmt: skip
    old["checksum"] = sha256_of_json(old)
    (folder / old["weights"]).write_bytes(blob)
    (folder / "adapter.json").write_text(json.dumps(old, indent=1))
