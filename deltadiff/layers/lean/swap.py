"""Lean blocks are put into a model, and taken out."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ...ops.backends import TRITON_BACKENDS
from ..lora_layers import HoldsPairs, lora_layers
from .gated_mlp import LeanGatedMlp, looks_gated, why_not_lean
from .known_forwards import rms_norm_form
from .lean_forward import lean_forward
from .rms_norm import LeanRmsNorm, why_not_weight


class LeanRow(NamedTuple):
    """One block of a model.

    Attributes:
        module: its name in the model.
        what: "gated MLP" or "RMSNorm".
        why_not: empty where the block is lean, else the reason in words.
    """

    module: str
    what: str
    why_not: str


def make_lean_(model: nn.Module, lean: bool | None) -> None:
    """Make the gated MLPs of a swapped model lean, and the norms whose output its layers read.

    ``lean``: as for `swap_`. Blocks that are lean already stay so, unless it is False.
    """
    if lean is False:
        undo_lean_(model)
    if not (_costs_no_time(model) if lean is None else lean):
        return
    for block in _blocks(model):
        if block.why_not is None and lean_forward(block.module) is None:
            block.module.forward = block.kind(block.module)


def _costs_no_time(model: nn.Module) -> bool:
    """Whether the layers run by Triton; their blocks then have kernels of their own."""
    layers = lora_layers(model).values()
    return any(layer.dispatch.backend in TRITON_BACKENDS for layer in layers if layer.active)


def undo_lean_(model: nn.Module) -> None:
    """Give the modules of a model the forward passes back that they had before."""
    for module in model.modules():
        forward = lean_forward(module)
        if forward is None:
            continue
        del module.forward
        if forward.own is not None:
            module.forward = forward.own


def lean_rows(model: nn.Module) -> list[LeanRow]:
    """The blocks of a model in which some are lean; empty for another model."""
    if not any(lean_forward(module) for module in model.modules()):
        return []
    rows = []
    for name, module, kind, why_not in _blocks(model):
        forward = lean_forward(module)
        if forward is not None:
            rows.append(LeanRow(name, forward.what, forward.why_changed() or ""))
        else:
            rows.append(LeanRow(name, kind.what, why_not or "added later"))
    return rows


def in_words(rows: Sequence[LeanRow]) -> list[str]:
    """Lines that say how many blocks are lean, and which are not and why."""
    counts = Counter((row.what, row.why_not) for row in rows)
    lean = [f"{n} x {what}" for (what, why_not), n in counts.items() if not why_not]
    lines = [f"lean (they keep less for the backward pass): {', '.join(lean) or 'none'}"]
    for (what, why_not), n in counts.items():
        if why_not:
            first = next(row for row in rows if (row.what, row.why_not) == (what, why_not)).module
            more = f" and {n - 1} more" if n > 1 else ""
            lines.append(f"not lean: {what} {first}{more}: {why_not}")
    return lines if counts else []


class _Block(NamedTuple):
    """A module that is lean, or could be but for ``why_not``."""

    name: str
    module: nn.Module
    kind: type[LeanGatedMlp] | type[LeanRmsNorm]
    why_not: str | None


def _blocks(model: nn.Module) -> list[_Block]:
    norms, found = {id(module) for module in _norms(model).values()}, []
    for name, module in model.named_modules():
        forward = lean_forward(module)
        if isinstance(forward, LeanGatedMlp) or (forward is None and looks_gated(module)):
            found.append(_Block(name, module, LeanGatedMlp, why_not_lean(module)))
        elif isinstance(forward, LeanRmsNorm) or id(module) in norms:
            reason = why_not_weight(getattr(module, "weight", None))
            found.append(_Block(name, module, LeanRmsNorm, reason))
    return found


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """The RMSNorms that stand beside a part of the model with a swapped layer of their width."""
    found = {}
    for prefix, parent in model.named_modules():
        widths = {id(child): _widths(child) for child in parent.children()}
        for name, child in parent.named_children():
            if lean_forward(child) is None and rms_norm_form(child) is None:
                continue
            others = (w for other, w in widths.items() if other != id(child))
            weight = getattr(child, "weight", None)
            if weight is not None and any(weight.numel() in w for w in others):
                found[f"{prefix}.{name}" if prefix else name] = child
    return found


def _widths(module: nn.Module) -> set[int]:
    return {m.in_features for m in module.modules() if isinstance(m, HoldsPairs)}
