"""`swap_` puts `LoraLinear` layers in the place of eager ones, `unswap_` takes them out again."""

import inspect
import math
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checks import check_dropout, check_int, check_number
from ..errors import ArgumentError, ArgumentTypeError
from ..ranks import check_not_partitioned, reshard
from .base_format import base_format, check_backend
from .fsdp_places import check_replaceable, follow_layers, follow_training
from .lean.swap import make_lean_, undo_lean_
from .linear import check_rank, is_peft_model, linear_shape
from .loading_check import unwatch_loading, watch_loading
from .lora_layers import lora_layers, swapped_layers
from .lora_linear import LoraLinear, own_layers
from .model_notes import drop_notes, note_required_grad, restore_required_grad
from .report import SwapReport, swap_report
from .swap_peft import swap_peft_
from .targets.choose import Targets, choose_modules
from .targets.eligible import is_linear
from .targets.heads import find_heads
from .targets.trained import trained_whole

if TYPE_CHECKING:
    from .linear import LinearLayer


def swap_(
    model: nn.Module,
    *,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: Targets = "all-linear",
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Collection[str] = (),
    backend: str | None = None,
    seed: int | None = None,
    lean: bool | None = None,
) -> SwapReport:
    """Replace linear layers by fast LoRA layers, in place. Weights are shared, not copied.

    An ``nn.Linear`` (or GPT-2's ``Conv1D``) gets a new low-rank pair: A by Kaiming's uniform rule,
    B = 0 (Delta-LoRA, Algorithm 1). All other parameters are frozen, except those of
    ``modules_to_save``, or of new heads. The report tells what was left out and why, how much of
    the model's weight is adapted, and what trains no more.

    In a PEFT model nothing is replaced or frozen: its LoRA layers stay PEFT's, with their adapters,
    and only their forward pass becomes faster. The report says which calls take PEFT's own forward
    pass, and why. Such a model takes ``target_modules`` and ``backend`` alone.

    Args:
        model: any module that contains linear layers.
        r: rank, 1 to min(in, out) of every layer. "all-linear" leaves out layers that are smaller,
            such as a gate of one output; the report names them.
        lora_alpha: the branch is scaled by lora_alpha / r.
        target_modules: "all-linear" (all but heads and what cannot be taken, see `eligible`), a
            regular expression that matches the whole name, a collection of names (or their last
            parts), or a function of the name and module of each linear layer.
        lora_dropout: in training, the probability that the branch does not see an element of its
            input, 0 <= p < 1, rounded to 1/65536. Delta-LoRA forbids dropout: `DeltaLoRA` refuses
            such layers unless ``update_ratio=0``.
        use_rslora: scale by lora_alpha / sqrt(r), as rsLoRA does.
        adapter_dtype: dtype of A and B, which is that of the weight, or float32 beside a 16-bit or
            quantised weight. None means float32, or float64 beside a float64 weight.
        modules_to_save: names (or last parts) of modules that stay trainable. Where there are none,
            the new heads of a transformers model do, such as that of sequence classification,
            unless ``target_modules`` is a function, which then decides alone.
        backend: None chooses a path for each layer (see `choose_path`); a name asks for one.
        seed: fixes the initial values of A; None draws them from PyTorch's generator.
        lean: whether blocks around the layers keep less for the backward pass. A gated MLP makes
            the input of its last layer again, and layers behind an RMSNorm make theirs again from
            the norm's own input. Results are equal to rounding. The report tells which blocks are
            lean and why others are not. Compiled models decide for themselves what they keep. None
            means where it costs no time: where the Triton kernels run.

    Returns:
        A report of the layers, their paths and the reasons; it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: a value outside the limits above; nothing was changed.
            Where targets match nothing, the message lists similar names; where they name something
            that cannot be taken, it says why.
        BackendUnavailableError: ``backend`` cannot run here, or cannot run one of these layers.
        SwapError: a PEFT model none of whose layers can be faster; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    if lean is not None and not isinstance(lean, bool):
        raise ArgumentTypeError("lean", repr(lean), "True, False or None")
    if is_peft_model(model):
        settled = {
            "r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
            "use_rslora": use_rslora, "adapter_dtype": adapter_dtype,
            "modules_to_save": modules_to_save, "seed": seed,
        }  # fmt: skip
        defaults = inspect.signature(swap_).parameters
        for name, value in settled.items():
            if value != defaults[name].default:
                accepted = "the default, because PEFT's configuration of this model settles it"
                raise ArgumentError(name, repr(value), accepted)
        return swap_peft_(model, target_modules, backend, lean)
    check_int("r", r, 1)
    if check_number("lora_alpha", lora_alpha, 0) == 0:
        raise ArgumentError("lora_alpha", lora_alpha, "a number above 0")
    check_dropout("lora_dropout", lora_dropout)
    if not isinstance(use_rslora, bool):
        raise ArgumentTypeError("use_rslora", repr(use_rslora), "True or False")
    scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
    branch = _Branch(r, lora_alpha, scaling, float(lora_dropout), adapter_dtype, backend)
    chosen = choose_modules(model, target_modules, modules_to_save, to_swap=True)
    small = [n for n, m in chosen.items() if min(linear_shape(m)) < r]
    if target_modules == "all-linear" and len(small) < len(chosen):
        chosen = {name: module for name, module in chosen.items() if name not in small}
    else:
        small = []  # `check_rank` refuses them
    # A function of the caller decides alone, as that of `load_adapter` does.
    heads = () if callable(target_modules) else find_heads(model).new.values()
    whole = trained_whole(model, chosen.values(), modules_to_save, heads)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    layers: dict[nn.Module, LoraLinear] = {}  # by module, which may stand in several places
    for name, module in chosen.items():
        if module in layers:
            continue
        assert is_linear(module)
        layers[module] = _new_layer(name, module, branch, generator)

    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        warnings.warn(
            "DistributedDataParallel does not average the gradients of pairs that it did not see "
            "when it wrapped the model: to train them, call `swap_` or `load_adapter` first",
            stacklevel=2,
        )
    note_required_grad(model)
    earlier = {id(p) for m in lora_layers(model).values() for p in m.adapter}
    for p in model.parameters():
        if id(p) not in earlier:
            p.requires_grad = id(p) in whole  # not requires_grad_, which lazy ones refuse
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    replace_modules(model, layers.items())
    for layer in layers.values():
        layer.share_with_base()
    make_lean_(model, lean)
    watch_loading(model)
    report = swap_report(model)
    if not small:
        return report
    note = f"{len(small)} layers are smaller than r = {r} and got no pair: {', '.join(small[:3])}"
    return replace(report, notes=(*report.notes, note + (", ..." if len(small) > 3 else "")))


def unswap_(model: nn.Module) -> nn.Module:
    """Put the eager layers back and restore which parameters require gradients.

    What Delta-LoRA wrote into W in place stays there. The low-rank branch is dropped (call `merge_`
    instead to keep it). PEFT's layers get PEFT's own forward pass back and keep all that they have.
    A model that FSDP shards stays sharded.

    Raises:
        SwapError: the model has no swapped layer; or a layer of PEFT holds an update of Delta-LoRA,
            of which PEFT knows nothing; or `fully_shard` was called on a layer itself, or tensor
            parallelism splits one. Nothing was changed.
    """
    layers = swapped_layers(model)
    check_not_partitioned("unswap_", model)
    if any(layer.in_peft for layer in layers.values()):
        from .peft.fuse import unfuse_

        unfuse_(model)
        undo_lean_(model)
        return model
    own = own_layers(model, "unswap_", "")
    check_replaceable("unswap_", model, own)
    reshard(model)
    take_out(model, {layer: layer.base_layer for layer in own.values()})
    restore_required_grad(model)
    follow_training(model)
    drop_notes(model)
    unwatch_loading(model)
    return model


def take_out(model: nn.Module, replacements: dict[LoraLinear, nn.Module]) -> None:
    """Put eager layers in the place of swapped ones, with the swapped ones' weights and biases."""
    undo_lean_(model)
    for layer, eager in replacements.items():
        layer.leave_base()
        eager.train(layer.training)
        layer.swapped_in = False
    replace_modules(model, replacements.items())
    follow_layers(model, replacements)


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Replace the first module of each pair by the second, in every place where it stands."""
    new = dict(pairs)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in new:
                setattr(parent, child, new[module])


# ------------------------------------------------------------------------- a new layer


@dataclass(frozen=True)
class _Branch:
    """The arguments of `swap_` that describe the branch of a new layer."""

    r: int
    lora_alpha: float
    scaling: float
    lora_dropout: float
    adapter_dtype: torch.dtype | None
    backend: str | None


def _new_layer(
    name: str, module: "LinearLayer", branch: _Branch, generator: torch.Generator | None
) -> LoraLinear:
    """The layer that stands for an ``nn.Linear`` or a `Conv1D`, with a new pair."""
    w, r = module.weight, branch.r
    check_rank("r", r, name, module)
    dtypes = base_format(module).adapter_dtypes
    dtype = branch.adapter_dtype or dtypes[-1]
    if dtype not in dtypes:
        accepted = f"{' or '.join(map(str, dtypes))} for {name}"
        raise ArgumentTypeError("adapter_dtype", dtype, accepted)
    check_backend(module, r, branch.lora_dropout, branch.backend)
    n, k = linear_shape(module)
    bound = math.sqrt(1 / k)  # Kaiming's uniform rule with a = sqrt(5)
    a = torch.empty(r, k).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(n, r, dtype=dtype, device=w.device)
    a = a.to(w.device, dtype)
    layer = LoraLinear(
        module, a, b, branch.lora_alpha, branch.scaling, branch.lora_dropout, branch.backend
    )
    return layer.train(module.training)
