"""`deltadiff bench model`: training steps of a whole model with random weights.

One model serves all methods: each puts its adapters in, is timed, and takes them out again. The
floor is the frozen model, forward and backward to the embeddings. It is timed between any two
methods, and a method is compared with the frozen steps right before and right after it. There are
as many on each side as timed steps of the method, and their median is taken, so a single slow one
does not count.
"""

import functools
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn

from ..checks import dtype_name
from ..devices import free_memory
from ..errors import ArgumentError
from ..ops.backends import why_unavailable
from .checkpointing import check_offload, checkpointing_of, within
from .clocks import time_steps
from .methods import Method, Names, Settings, forward_backward, methods
from .models import (
    BASES,
    LLAMA_7B,
    LLAMA_SMALL,
    PRESETS,
    Batch,
    build_model,
    random_batch,
    shape_of_file,
    use_liger_,
)
from .own_process import peer_timings
from .records import Timing, failure, record

VARIANTS = (
    "frozen", "deltadiff", "deltadiff-fp8", "deltadiff-layers", "peft-swapped", "peft", "peft-bf16",
)  # fmt: skip
# The values of --targets. A model has one of the sets of names; None is all linear layers.
TARGETS = {"q,v": (("q_proj", "v_proj"), ("query", "value")), "all": None}


def settings_for(device: torch.device, **options) -> Settings:
    """The defaults for ``device``, smaller on a CPU; ``options`` replace some of them."""
    small = {"batch": 2, "sequence": 64, "dtype": torch.float32}
    return Settings(**{**({} if device.type == "cuda" else small), **options})


def model_records(
    device: torch.device,
    settings: Settings,
    targets: Collection[str] = tuple(TARGETS),
    checkpointing: Collection[bool] = (False, True),
    wanted: Collection[str] | None = None,
) -> Iterator[dict]:
    """Yield a record of each method when it was measured, and the frozen model's after the others.

    All of this is done once for each value of ``checkpointing``. ``peak_mib`` is absolute: it
    counts weights, activations and the optimizer's state.

    Args:
        device: where.
        settings: the model and the batch.
        targets: which layers are adapted, names from `TARGETS`, in turn.
        checkpointing: without gradient checkpointing, with it, or both.
        wanted: names from `VARIANTS`; None is all of them.
    """
    # transformers renames the methods that switch checkpointing; every release has the old names.
    warnings.filterwarnings("ignore", "`.*gradient_checkpointing", FutureWarning)
    shape = LLAMA_7B if device.type == "cuda" else LLAMA_SMALL
    if settings.preset is not None:
        shape = PRESETS[settings.preset]
    if settings.config is not None:
        shape = shape_of_file(settings.config)
    extra = settings.liger or settings.base != "bf16" or settings.offload is not None
    whole = settings.preset is not None or extra or bool(settings.peers)
    timings = list(peer_timings(shape, settings, tuple(checkpointing), device))
    model = build_model(shape, settings.dtype, device)
    BASES[settings.base](model, settings.dtype)
    if settings.liger:
        use_liger_(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        batch = random_batch(model, shape, settings.batch, settings.sequence, device)
    check_offload(model, device, settings.offload)
    batch.embeds.requires_grad_()
    chosen = [m for m in methods() if m.whole or not whole]
    if not whole:
        chosen = [m for m in chosen if m.variant != "deltadiff-layers"]
    if why_unavailable("fp8", device, settings.dtype):
        chosen = [m for m in chosen if m.variant != "deltadiff-fp8"]
    if settings.base != "bf16":  # nothing writes into such a weight
        chosen = [m for m in chosen if m.rounding is None]
    chosen = [m for m in chosen if m.bases is None or settings.base in m.bases]
    chosen = [m for m in chosen if wanted is None or m.variant in wanted]
    for checkpoint in checkpointing:
        fields = {
            "op": "whole_step" if whole else "model", "mode": "step", "graph": False,
            "model": shape.name,
            "shape": {"M": batch.labels.numel(), "K": None, "N": None, "r": settings.r},
            "batch": settings.batch, "sequence": settings.sequence,
            "dtype": dtype_name(settings.dtype), "checkpointing": checkpoint,
        }  # fmt: skip
        if whole:
            fields |= {"liger": settings.liger, "base": settings.base}
            fields |= {"offload": settings.offload if checkpoint else None}
        with checkpointing_of(model, checkpoint, settings.offload) as around:
            frozen_step = within(around, functools.partial(forward_backward, model, batch))
            before, peak = time_steps(frozen_step, settings.steps, device)
            frozen = [*before]
            for target in targets:
                for method in chosen:
                    if checkpoint and not (method.checkpointed and target == "all"):
                        continue
                    timing = measure_method(method, target, model, batch, settings, around)
                    after, _ = time_steps(frozen_step, settings.steps, device)
                    frozen += after
                    own = {"targets": target, "method": method.method, "rounding": method.rounding}
                    own["adapter_dtype"] = method.adapter_dtype(settings)
                    yield record({**fields, **own}, method.variant, timing, before + after)
                    before = after
            for name, on, timing in timings:
                if on == checkpoint:
                    own = {"targets": "all", "method": "LoRA", "rounding": None}
                    own["adapter_dtype"] = None  # what the peer takes by itself
                    yield record({**fields, **own}, name, timing, frozen)
            own = dict.fromkeys(("targets", "method", "rounding", "adapter_dtype"))
            timing = Timing(frozen, peak_mib=peak)
            yield record({**fields, **own}, "frozen", timing, frozen)


def measure_method(
    method: Method,
    target: str,
    model: nn.Module,
    batch: Batch,
    settings: Settings,
    around: AbstractContextManager | None = None,
) -> Timing:
    """Put a method into the model, time it and take it out; what it raises becomes a note.

    ``around``: a context in which each step runs.
    """
    device = batch.labels.device
    try:
        with method.attach(model, _find(model, target), batch, settings) as step:
            step = within(around, step)
            step()  # the first step of Delta-LoRA leaves W alone
            seconds, peak = time_steps(step, settings.steps, device)
            return Timing(seconds, peak_mib=peak)
    except Exception as error:  # a method that does not fit must not cost the others their figures
        note = failure(error)
    free_memory(device)  # outside of the clause above, whose exception holds tensors
    return Timing(note=note)


def _find(model: nn.Module, target: str) -> Names:
    """The names of the layers to adapt that ``target`` stands for in this model."""
    choices = TARGETS[target]
    if choices is None:
        return "all-linear"
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in choices:
        if there.issuperset(names):
            return list(names)
    accepted = " or ".join(", ".join(names) for names in choices)
    raise ArgumentError("--targets", f"{target} for a model without such layers", accepted)
