"""`export_peft`: the trained model as an ordinary LoRA adapter of PEFT, for the original base.

The trained weight is the original one plus a sum of low-rank products, so every method here is
LoRA to whoever uses the model. For Delta-LoRA with a constant lambda the sum is

    W_T + s B A = W_0 + s [(1 + lambda) B, -lambda B_k] [A; A_k]

of rank 2r, or of rank r where B_k = 0. Each further value of lambda adds r. Gates are multiplied
into B. The scale is multiplied into B too, and ``lora_alpha`` is the rank, so that a reader who
knows nothing of ``rank_pattern`` and ``alpha_pattern`` scales by 1 as well. Only plain LoRA of one
rank keeps its factors and its ``lora_alpha``, so that PEFT can train it further.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from warnings import warn

from safetensors.torch import save
from torch import Tensor, nn

from ...checks import check_int
from ...errors import ArgumentError, SwapError
from ...files import as_folder, remove_leftovers, write_bytes, write_json
from ...ranks import Ranks, check_not_partitioned, plain_kind, reshard
from ...text import align_columns
from ..lora_layers import HoldsPairs, LoraLayer
from ..low_rank_sum import low_rank_sum, whole_on_cpu
from ..rounded import rounding_note
from .heads import BesidePairs, beside_pairs
from .names import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    active_pairs,
    base_model,
    base_modules,
    check_places,
    pattern_of,
    target_modules,
)

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Stacked weights of experts, and linear layers that PEFT may take for the experts' (see `_notes`).
_FUSED_EXPERTS = {"gate_up_proj", "down_proj"}
_EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class ExportReport:
    """What `export_peft` wrote. It prints as a table.

    Attributes:
        path: of ``adapter_config.json``.
        shapes: (out, in) of each layer by name.
        ranks: the rank of each layer in the file.
        modules_to_save: the modules that the file holds whole.
        notes: what a user should know of this adapter.
    """

    path: Path
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    modules_to_save: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("module", "out x in", "r")]
        cells += [(n, f"{o} x {i}", str(self.ranks[n])) for n, (o, i) in self.shapes.items()]
        lines = [align_columns(cells), f"{len(self.shapes)} layers in {self.path}"]
        if self.modules_to_save:
            lines.append(f"saved whole: {', '.join(self.modules_to_save)}")
        return "\n".join([*lines, *self.notes])


def export_peft(
    model: nn.Module, folder: str | os.PathLike, *, pad_rank: bool | int | None = None
) -> ExportReport:
    """Write a LoRA adapter for the original base model, in PEFT's format.

    Of a model that FSDP shards, all processes call this, and the first one writes. They gather what
    is written, and no other part of the model.

    ``PeftModel.from_pretrained(base, folder)`` then computes what this model computes; PEFT need
    not be installed to write it. The factors are float32. All that Delta-LoRA added to W is in
    them, also what W holds now: the base must be the original one. Other parameters that require
    gradients, such as a new head's, are written as PEFT's ``modules_to_save``, with their modules,
    and biases of adapted layers as its ``bias="lora_only"``. Dropout and DiffoRA's selection are
    not written.

    The rank of a layer is 2r at most for Delta-LoRA with one lambda, and r for all else. Each
    further value of lambda adds r. Terms that are zero take no rank, for instance what AdaLoRA
    masked. No rank is higher than the smaller side of the layer.

    A 16-bit W that was updated in place with rounding "nearest" or "stochastic" lost or changed a
    part of the updates. The adapter holds all of them, so it is not quite this model; a warning
    says so.

    Args:
        model: a swapped model, or one of PEFT that was swapped; also inside of DDP or
            `torch.compile`.
        folder: made where it is missing. An adapter of PEFT in it is replaced; a crash meanwhile
            leaves no adapter, never parts of two. Other files stay.
        pad_rank: one rank for all layers, padded with zeros: True for the next of those that vLLM
            takes (1, 8, 16, 32, 64, 128, 256, 320, 512), or a number.

    Returns:
        A report with the rank of each layer; it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: ``folder`` is no path, or empty, or its
            ``adapter_config.json`` is not PEFT's; ``pad_rank`` is below a layer's rank; a parameter
            is on meta. Nothing was written.
        SwapError: the model has no swapped layer; a layer stands in several places, of which PEFT
            adapts one; PEFT cannot save a trained parameter; the update of W is not kept as factors
            any more. Nothing was written.
    """
    folder = as_folder("folder", folder)
    _check_replaceable(folder)
    check_not_partitioned("export_peft", model)
    pad_rank = None if pad_rank is False else pad_rank
    sharded = reshard(model)
    base = base_model(model)
    modules = base_modules(base)
    layers = _layers(modules)
    check_places(base, {name: modules[name] for name in layers})
    beside = beside_pairs(base, modules, {name: pairs[0] for name, pairs in layers.items()})
    every = [pair for pairs in layers.values() for pair in pairs]
    as_it_is = pad_rank is None and len(every) == len(layers) and _is_plain(every)
    factors = {
        name: _pair(name, pairs[0]) if as_it_is else low_rank_sum(name, pairs)
        for name, pairs in layers.items()
    }
    ranks = _ranks({name: a.shape[0] for name, (_, a) in factors.items()}, pad_rank)
    tensors = {f"{PREFIX}{name}": t for name, t in beside.tensors.items()}
    for name, (b, a) in factors.items():
        more = ranks[name] - a.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, more))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = nn.functional.pad(b, (0, more))
    r = max(ranks.values())
    scaling = every[0].scaling if as_it_is else 1
    config = {
        "auto_mapping": None if beside.task_type else {
            "base_model_class": plain_kind(base).__name__,
            "parent_library": plain_kind(base).__module__,
        },
        "base_model_name_or_path": getattr(base, "name_or_path", None) or None,
        "bias": beside.bias,
        "fan_in_fan_out": any(pair.transposed for pair in every),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(r * scaling) if r * scaling % 1 == 0 else r * scaling,
        "lora_dropout": 0.0,
        "modules_to_save": beside.modules_to_save or None,
        "peft_type": "LORA",
        "r": r,
        "target_modules": target_modules(layers, modules),
        "task_type": beside.task_type,
        "rank_pattern": pattern_of(ranks, r),
        "alpha_pattern": {} if as_it_is else pattern_of(ranks, r),
    }  # fmt: skip
    processes = Ranks() if sharded else None
    if processes is None or processes.rank == 0:
        _write(folder, config, save(tensors))
    if processes is not None:
        processes.wait()  # after this call the files are there for all
    path = folder / CONFIG_FILE
    shapes = {name: (b.shape[0], a.shape[1]) for name, (b, a) in factors.items()}
    notes = _notes(layers, modules, beside, pad_rank)
    return ExportReport(path, shapes, ranks, tuple(beside.modules_to_save), notes)


# --------------------------------------------------------------------- what is exported


def _layers(modules: Mapping[str, nn.Module]) -> dict[str, list[LoraLayer]]:
    """The active pairs of each layer that has some, by the first of its names."""
    layers: dict[str, list[LoraLayer]] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        if isinstance(module, HoldsPairs) and id(module) not in seen:
            seen.add(id(module))
            layers |= {name: pairs} if (pairs := active_pairs(name, module)) else {}
    if not layers:
        given = "a model without swapped layers, or with none of PEFT's adapters active"
        raise SwapError("model", given, "a model that `swap_` changed")
    return layers


def _is_plain(pairs: Sequence[LoraLayer]) -> bool:
    """Whether all pairs are LoRA of one rank and one scale, which ``lora_alpha`` can express."""
    kinds = {(pair.r, pair.scaling) for pair in pairs}
    r, scaling = next(iter(kinds))
    if len(kinds) > 1 or r * scaling / r != scaling:
        return False
    return not any(
        pair.gate is not None or (pair.delta is not None and pair.delta.changes_model())
        for pair in pairs
    )


def _pair(name: str, pair: LoraLayer) -> tuple[Tensor, Tensor]:
    b, a = (whole_on_cpu(name, p).float() for p in (pair.lora_B, pair.lora_A))
    return b, a


def _ranks(ranks: dict[str, int], pad_rank: bool | int | None) -> dict[str, int]:
    """The rank of each layer in the file."""
    if pad_rank is None:
        return ranks
    choices = VLLM_RANKS if pad_rank is True else (check_int("pad_rank", pad_rank, 1),)
    name, most = max(ranks.items(), key=lambda item: item[1])
    rank = min((choice for choice in choices if choice >= most), default=None)
    if rank is None:
        given = f"{pad_rank} (vLLM takes at most {choices[-1]})" if pad_rank is True else pad_rank
        raise ArgumentError("pad_rank", given, f"at least {most}, the rank of {name}")
    return dict.fromkeys(ranks, rank)


def _notes(
    layers: Mapping[str, Sequence[LoraLayer]],
    modules: Mapping[str, nn.Module],
    beside: BesidePairs,
    pad_rank: bool | int | None,
) -> tuple[str, ...]:
    """What differs for whom reads the adapter; what may be wrong there is a warning, too."""
    warnings = []
    if rounded := rounding_note(layers):
        warnings.append(rounded)
    fused = [n for n, m in modules.items() if _FUSED_EXPERTS & m._parameters.keys()]
    like_experts = [n for n in layers if fused and n.rpartition(".")[2] in _EXPERT_NAMES]
    if like_experts:
        warnings.append(
            f"recent PEFT with transformers 5 may take the pairs of {len(like_experts)} layers, "
            f"{like_experts[0]} among them, for pairs of the experts in {fused[0]}: it then warns "
            "of missing keys and leaves them out. Train no pairs on these layers for it, or call "
            "`merge_` and save the whole model"
        )
    for text in warnings:
        warn(text, stacklevel=3)
    if pad_rank and (beside.modules_to_save or beside.bias != "none"):
        return *warnings, "vLLM takes pairs alone: no modules_to_save and no biases"
    return tuple(warnings)


# -------------------------------------------------------------------------------- files


def _check_replaceable(folder: Path) -> None:
    """Raise where the folder has a configuration file of somebody else under PEFT's name."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return
    try:
        peft = "peft_type" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        peft = False
    if not peft:
        raise ArgumentError("folder", f"{path}, which is not PEFT's", "another folder")


def _write(folder: Path, config: dict[str, object], weights: bytes) -> None:
    """Write the two files. A crash leaves the old adapter, none or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / CONFIG_FILE, folder / f".{WEIGHTS_FILE}.new"
    remove_leftovers(folder, "|".join(re.escape(p.name) for p in (path, new)))
    write_bytes(new, weights)  # Where the disk is full, the old adapter stays.
    path.unlink(missing_ok=True)
    os.replace(new, folder / WEIGHTS_FILE)
    write_json(path, config)
