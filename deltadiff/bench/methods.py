"""The ways to train that `deltadiff bench model` compares, each taken out again after its turn."""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, dtype_name
from ..layers.swap import swap_, unswap_
from ..optim.delta_lora import DeltaLoRA
from .models import Batch
from .peers import has_peft, naive_update

LR, UPDATE_RATIO, ALPHA = 1e-4, 0.5, 16

Step = Callable[[], object]
Names = list[str] | str  # of the layers to adapt, for PEFT and `swap_` alike


@dataclass(frozen=True)
class Settings:
    """The settings that all methods share.

    Attributes:
        config: a Hugging Face config file; None is ``preset``.
        preset: a name of `models.PRESETS`; None is Llama-2-7B, or on a CPU a small model.
        liger: whether all methods, and the frozen model, run with Liger's kernels.
        base: a name of `models.BASES`.
        offload: a name of `checkpointing.OFFLOADING`, which keeps what checkpointing keeps in the
            host's memory; None keeps it where it is.
        peers: names of `own_process.PEERS`, which are measured too.
        batch, sequence: texts per step, and the tokens of each.
        r: the rank of the pairs.
        dtype: of the model.
        adapter_dtype: of A and B in deltadiff's layers; PEFT's variants have their own.
        steps: how many steps are timed.
    """

    config: Path | None = None
    preset: str | None = None
    liger: bool = False
    base: str = "bf16"
    offload: str | None = None
    peers: tuple[str, ...] = ()
    batch: int = 4
    sequence: int = 2048
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32
    steps: int = 3


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        variant: the library, as records name it.
        method, rounding: what it does, as records name it.
        whole: whether it is measured in whole steps too: with a preset, Liger or a quantised base.
        checkpointed: whether it is also measured with gradient checkpointing, all layers adapted.
        attach: attach(model, names, batch, settings) puts it into a model: a context that yields
            its training step and leaves the model as it was, but for updates of W.
        bases: names of `models.BASES` that it is for; None is all of them.
    """

    variant: str
    method: str
    rounding: str | None
    checkpointed: bool
    whole: bool
    attach: Callable[[nn.Module, Names, Batch, Settings], AbstractContextManager[Step]]
    bases: tuple[str, ...] | None = None

    def adapter_dtype(self, settings: Settings) -> str:
        """The name of the dtype of A and B."""
        own = {"peft": torch.float32, "peft-swapped": torch.float32, "peft-bf16": settings.dtype}
        return dtype_name(own.get(self.variant, settings.adapter_dtype))


def methods() -> tuple[Method, ...]:
    """The methods in the order in which they run; those of PEFT only where it is installed."""

    def peft(**how) -> Callable:
        return functools.partial(_peft, **how)

    def deltadiff(lean: bool | None = None, backend: str | None = None, **options) -> Callable:
        return functools.partial(_deltadiff, options, lean, backend)

    naive = peft(layer_dtype=True, naive_delta_lora=True)
    in_place = "Delta-LoRA in place"
    swapped = peft(layer_dtype=False, update_ratio=0.0)
    factored = peft(layer_dtype=False, update_ratio=UPDATE_RATIO)
    peers = (
        Method("peft-swapped", "LoRA", None, True, False, swapped),
        Method("peft-swapped", "Delta-LoRA factored", None, False, False, factored),
        Method("peft", "LoRA", None, True, False, peft(layer_dtype=False)),
        Method("peft-bf16", "LoRA", None, True, True, peft(layer_dtype=True)),
        Method("peft-bf16", "naive Delta-LoRA", None, True, False, naive),
    )
    layers = deltadiff(update_ratio=0.0, lean=False)
    in_fp8 = deltadiff(update_ratio=0.0, backend="fp8")
    ours = (
        Method("deltadiff", "LoRA", None, True, True, deltadiff(update_ratio=0.0)),
        Method("deltadiff-layers", "LoRA", None, True, True, layers),
        Method("deltadiff-fp8", "LoRA", None, True, True, in_fp8, ("fp8",)),
        Method("deltadiff", in_place, "remainder", True, True, deltadiff(rounding="remainder")),
        Method("deltadiff", in_place, "nearest", False, False, deltadiff(rounding="nearest")),
        Method(
            "deltadiff", "Delta-LoRA factored", None, False, True, deltadiff(w_update="factored")
        ),
    )
    return (*peers, *ours) if has_peft() else ours


def forward_backward(model: nn.Module, batch: Batch, autocast: torch.dtype | None = None) -> None:
    """The model's own loss, and its gradients down to the embeddings."""
    batch.embeds.grad = None
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(batch.labels.device.type, dtype=autocast))
        loss = model(inputs_embeds=batch.embeds, labels=batch.labels, use_cache=False).loss
    loss.backward()


def _randomise(model: nn.Module) -> list[Tensor]:
    """The trainable parameters, filled with noise: a product with zeros would be faster."""
    found = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in found:
            p.normal_(std=0.02)
    return found


@contextmanager
def _deltadiff(
    options: Mapping,
    lean: bool | None,
    backend: str | None,
    model: nn.Module,
    names: Names,
    batch: Batch,
    settings: Settings,
) -> Iterator[Step]:
    swap_(
        model, r=settings.r, lora_alpha=ALPHA, target_modules=names,
        adapter_dtype=settings.adapter_dtype, lean=lean, backend=backend,
    )  # fmt: skip
    try:
        _randomise(model)
        optimizer = DeltaLoRA(model, lr=LR, **{"update_ratio": UPDATE_RATIO, **options})

        def step() -> None:
            forward_backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", 'rounding="nearest" lost')
            yield step
    finally:
        unswap_(model)


@contextmanager
def _peft(
    model: nn.Module,
    names: Names,
    batch: Batch,
    settings: Settings,
    *,
    layer_dtype: bool,
    naive_delta_lora: bool = False,
    update_ratio: float | None = None,
) -> Iterator[Step]:
    """PEFT. Its adapters are float32 under autocast, as trainers run it, or of the layers' dtype.

    ``naive_delta_lora`` also updates W after each step, by the formula in plain PyTorch.
    ``update_ratio`` swaps the model and trains it with `DeltaLoRA`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.r, lora_alpha=ALPHA, target_modules=names)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=not layer_dtype)
    try:
        if layer_dtype:  # which PEFT takes from a quantised base, or leaves at float32 there
            for p in wrapped.parameters():
                p.data = p.data.to(settings.dtype) if p.requires_grad else p.data
        params = _randomise(wrapped)
        if update_ratio is None:
            optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
        else:
            swap_(wrapped)
            optimizer = DeltaLoRA(wrapped, lr=LR, update_ratio=update_ratio)
        half = settings.dtype in HALF_DTYPES
        autocast = settings.dtype if half and not layer_dtype else None
        layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")] if naive_delta_lora else []
        pairs = [(m.lora_B["default"].weight, m.lora_A["default"].weight) for m in layers]
        weights = [m.get_base_layer().weight for m in layers]
        scale = UPDATE_RATIO * ALPHA / settings.r

        def step() -> None:
            forward_backward(wrapped, batch, autocast)
            old = [(b.detach().clone(), a.detach().clone()) for b, a in pairs]
            optimizer.step()
            with torch.no_grad():
                naive_update(weights, pairs, old, scale)
            optimizer.zero_grad()

        yield step
    finally:
        wrapped.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):  # PEFT would warn of an adapter
            model.__dict__.pop(name, None)
        model.requires_grad_(False)
