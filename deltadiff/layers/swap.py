"""`swap_` puts `LoraLinear` layers in the place of eager ones, `unswap_` takes them out."""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..checks import DTYPES, check_dropout, check_int, check_number
from ..errors import ArgumentError, ArgumentTypeError, SwapError
from ..ops.dispatch import choose_path
from .linear import linear_shape
from .lora_linear import LoraLinear, lora_layers
from .peft import _from_peft
from .report import SwapReport, swap_report
from .targets import Targets, _match_names, choose_modules, is_peft

SELECTION = "_deltadiff_selection"  # where a model keeps what DiffoRA selected


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
) -> SwapReport:
    """Replace linear layers by fast LoRA layers, in place. Weights are shared, not copied.

    ``nn.Linear`` (or GPT-2's ``Conv1D``) gets a new low-rank pair: A by Kaiming's uniform rule,
    B = 0 (Delta-LoRA, Algorithm 1). PEFT's ``lora.Linear`` keeps its pair, scaling and dropout;
    ``r``, ``lora_alpha``, ``lora_dropout``, ``use_rslora`` and ``adapter_dtype`` do not apply to
    it. Everything else is frozen, except ``modules_to_save``.

    Args:
        model: any module that contains linear layers.
        r: rank, 1 to min(in, out) of every layer.
        lora_alpha: the branch is scaled by lora_alpha / r.
        target_modules: "all-linear" (all but the output head), a regular expression that matches
            the whole name, a collection of names (or their last parts), or a function of name and
            module.
        lora_dropout: in training, the probability that the branch does not see an element of its
            input, 0 <= p < 1, rounded to 1/65536. Delta-LoRA forbids it: `DeltaLoRA` refuses such
            layers unless ``update_ratio=0``.
        use_rslora: scale by lora_alpha / sqrt(r), as rsLoRA does.
        adapter_dtype: of A and B: the dtype of the weight or float32. None is float32 for a 16-bit
            weight, else the dtype of the weight.
        modules_to_save: names (or last parts) of modules that stay trainable, such as a new head.
        backend: None chooses a path for each layer (see `choose_path`); a name asks for one.
        seed: for the initial values of A; None takes PyTorch's generator.

    Returns:
        A report of the layers, their paths and reasons; prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: see above; nothing was changed. Targets that match
            nothing list near names.
        BackendUnavailableError: ``backend`` cannot run here, or not one of these layers.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    check_int("r", r, 1)
    if check_number("lora_alpha", lora_alpha, 0) == 0:
        raise ArgumentError("lora_alpha", lora_alpha, "a number above 0")
    check_dropout("lora_dropout", lora_dropout)
    if not isinstance(use_rslora, bool):
        raise ArgumentTypeError("use_rslora", repr(use_rslora), "True or False")
    scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
    branch = r, lora_alpha, scaling, float(lora_dropout), adapter_dtype
    chosen = choose_modules(model, target_modules, modules_to_save)
    kept = _match_names("modules_to_save", modules_to_save, [n for n, _ in model.named_modules()])
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    layers: dict[nn.Module, LoraLinear] = {}  # a module that stands in two places stays one
    for name, module in chosen.items():
        if module not in layers:
            make = _from_peft if is_peft(module) else _from_linear
            layers[module] = make(name, module, branch, backend, generator)

    before = model.__dict__.setdefault("_deltadiff_required_grad", {})
    earlier = {id(p) for m in lora_layers(model).values() for p in m.adapter}
    for name, p in model.named_parameters():
        before.setdefault(name, p.requires_grad)
        saved = any(name.startswith(f"{k}.") for k in kept) and p.is_floating_point()
        peft_saved = ".modules_to_save." in name and p.requires_grad
        if id(p) not in earlier:
            p.requires_grad_(saved or peft_saved)
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    _replace(model, layers)
    return swap_report(model)


def unswap_(model: nn.Module) -> nn.Module:
    """Put the eager layers back and restore which parameters require gradients.

    What in-place Delta-LoRA wrote into W stays there. The low-rank branch of a layer that was an
    ``nn.Linear`` is dropped (`merge_` first keeps it); PEFT's layers keep their pair.

    Raises:
        SwapError: the model has no swapped layer, or a PEFT layer would lose a factored delta.
    """
    layers = lora_layers(model)
    if not layers:
        raise SwapError("model", "a model without swapped layers", "a model that `swap_` changed")
    for name, layer in layers.items():
        delta = layer.delta
        if layer.original is not layer.base and delta and not delta.in_weight and delta.started():
            raise SwapError(
                name, "a PEFT layer with a factored delta, which PEFT cannot hold",
                "`merge_`, or DeltaLoRA(w_update='inplace')",
            )  # fmt: skip
    take_out(model, {layer: layer.original for layer in layers.values()})
    model.__dict__.pop(SELECTION, None)
    for name, required in model.__dict__.pop("_deltadiff_required_grad", {}).items():
        p = dict(model.named_parameters()).get(name)
        if p is not None:
            p.requires_grad_(required)
    return model


def take_out(model: nn.Module, replacements: dict[LoraLinear, nn.Module]) -> None:
    """Put eager layers where swapped ones are, with the weights and biases of these."""
    for layer, eager in replacements.items():
        layer.base.weight, layer.base.bias = layer.weight, layer.bias
        eager.train(layer.training)
        layer.swapped_in = False
    _replace(model, replacements)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they stand."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in new:
                setattr(parent, child, new[module])


# ----------------------------------------------------------------- construction


def _from_linear(name, module, branch, backend, generator) -> LoraLinear:
    w, (r, lora_alpha, scaling, dropout, dtype) = module.weight, branch
    if w.numel() == 0 or hasattr(w, "device_mesh"):
        raise ArgumentTypeError(f"weight of {name}", _describe(w), "a whole tensor (gather it)")
    n, k = linear_shape(module)
    if r > min(n, k):
        raise ArgumentError("r", r, f"1 to {min(n, k)}, the smaller side of {name} {n} x {k}")
    own = w.dtype if w.dtype in DTYPES else torch.float32
    half = own in (torch.bfloat16, torch.float16)
    dtype = dtype or (torch.float32 if half else own)
    if dtype not in (own, torch.float32) or own == torch.float64 != dtype:
        accepted = f"{own}" + (" or torch.float32" if half else "")
        raise ArgumentTypeError("adapter_dtype", dtype, f"{accepted} for {name}")
    if w.dtype in DTYPES:
        # raises where the backend cannot run
        choose_path(w.device, w.dtype, backend, (n, k, r), dropout > 0)
    bound = math.sqrt(1 / k)  # Kaiming's uniform rule with a = sqrt(5)
    a = torch.empty(r, k).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(n, r, dtype=dtype, device=w.device)
    a = a.to(w.device, dtype)
    layer = LoraLinear(module, module, a, b, lora_alpha, scaling, dropout, backend)
    return layer.train(module.training)


def _describe(t: Tensor) -> str:
    return f"{type(t).__name__} of shape {tuple(t.shape)}"
