"""`deltadiff bench model`: training steps of a whole model with random weights.

One model serves all variants: each puts its adapters in, is timed, and takes them out again. The
floor is the frozen model, forward and backward to the embeddings. It is timed between any two
variants, and a variant is compared with the frozen steps right before and after it: the median of
as many on each side as are timed of itself, so that a slow one among them does not count.
"""

import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import HALF_DTYPES, dtype_name
from ..devices import free_memory
from ..errors import ArgumentError
from ..layers.swap import swap_, unswap_
from ..optim.delta_lora import DeltaLoRA
from .layer import has_peft
from .step import naive_update
from .timing import Timing, failure, record, sample, synchronize

LR, UPDATE_RATIO, ALPHA = 1e-4, 0.5, 16


TARGETS = {"q,v": (("q_proj", "v_proj"), ("query", "value")), "all": None}


LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096,
}  # fmt: skip


SMALL = {
    **LLAMA_7B, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What all variants share. ``config``: a Hugging Face config file; None is Llama-2-7B's shape,
    or on a CPU a small one."""

    config: Path | None = None
    batch: int = 4
    sequence: int = 2048
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype = torch.float32  # of deltadiff's layers; `swap_` takes it by default
    steps: int = 3


def settings_for(device: torch.device, **options) -> Settings:
    """The defaults for ``device``, smaller on a CPU, with ``options`` instead of some."""
    small = {"batch": 2, "sequence": 64, "dtype": torch.float32}
    return Settings(**{**({} if device.type == "cuda" else small), **options})


@dataclass(frozen=True)
class Method:
    """One way to train. ``attach`` puts it into a model, as a context that yields its step."""

    variant: str
    method: str
    rounding: str | None
    checkpointed: bool  # whether gradient checkpointing is measured too, with all layers adapted
    attach: Callable


def methods() -> tuple[Method, ...]:
    """The variants in the order in which they run."""
    ours = functools.partial(Method, "deltadiff")
    found = [
        Method("peft", "LoRA", None, True, functools.partial(_peft, False, False)),
        Method("peft-bf16", "LoRA", None, True, functools.partial(_peft, True, False)),
        Method("peft-bf16", "naive Delta-LoRA", None, True, functools.partial(_peft, True, True)),
    ]
    found = found if has_peft() else []
    found.append(ours("LoRA", None, True, functools.partial(_deltadiff, {"update_ratio": 0.0})))
    for rounding in ("remainder", "nearest"):
        options = {"rounding": rounding}
        attach = functools.partial(_deltadiff, options)
        found.append(ours("Delta-LoRA in place", rounding, rounding == "remainder", attach))
    attach = functools.partial(_deltadiff, {"w_update": "factored"})
    return (*found, ours("Delta-LoRA factored", None, False, attach))


def model_records(
    device: torch.device,
    settings: Settings,
    targets: Collection[str] = tuple(TARGETS),
    checkpointing: Collection[bool] = (False, True),
    wanted: Collection[str] | None = None,
) -> Iterator[dict]:
    """One record a variant, as they come, and one of the frozen model after each group of them.

    ``peak_mib`` is absolute: weights, activations, optimizer state and all.
    """
    # transformers renames the methods that switch checkpointing; every release has the old names.
    warnings.filterwarnings("ignore", "`.*gradient_checkpointing", FutureWarning)
    name, model = build_model(device, settings)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        tokens = (settings.batch, settings.sequence)
        labels = torch.randint(model.config.vocab_size, tokens, device=device)
        embeds = model.get_input_embeddings()(labels).detach().requires_grad_()
    todo = [m for m in methods() if wanted is None or m.variant in wanted]
    for checkpoint in checkpointing:
        with _checkpointing(model, checkpoint):
            step = functools.partial(_forward_backward, model, embeds, labels, None)
            fields = {
                "op": "model", "mode": "step", "graph": False, "model": name,
                "shape": {"M": labels.numel(), "K": None, "N": None, "r": settings.r},
                "batch": settings.batch, "sequence": settings.sequence,
                "dtype": dtype_name(settings.dtype), "checkpointing": checkpoint,
            }  # fmt: skip
            floor = _time(step, settings.steps, device)
            before, frozen = floor.seconds, [*floor.seconds]
            for target, names in ((t, TARGETS[t]) for t in targets):
                for m in todo:
                    if checkpoint and not (m.checkpointed and target == "all"):
                        continue
                    timing = _measure(m, device, names, model, embeds, labels, settings)
                    after = _time(step, settings.steps, device).seconds
                    frozen += after
                    own = {"targets": target, "method": m.method, "rounding": m.rounding}
                    own["adapter_dtype"] = _adapter_dtype(m, settings)
                    yield record({**fields, **own}, m.variant, timing, before + after)
                    before = after
            own = {"targets": None, "method": None, "rounding": None, "adapter_dtype": None}
            yield record({**fields, **own}, "frozen", Timing(frozen, None, floor.peak_mib), frozen)


def build_model(device: torch.device, settings: Settings) -> tuple[str, nn.Module]:
    """(its name, the model), made on ``device`` with random weights and frozen.

    Raises:
        ArgumentError: no transformers, or a config that it cannot make a language model of.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        accepted = 'an installed transformers: pip install "deltadiff[finetune]"'
        raise ArgumentError("transformers", f"nothing ({error})", accepted) from error
    if settings.config is None:
        gpu = device.type == "cuda"
        name, options = ("Llama-2-7B", LLAMA_7B) if gpu else ("Llama-2 small", SMALL)
        config = AutoConfig.for_model(**options)
    else:
        try:
            config = AutoConfig.from_pretrained(settings.config, local_files_only=True)
        except (OSError, ValueError) as error:
            accepted = "a Hugging Face config.json or its folder"
            raise ArgumentError("--config", f"{settings.config} ({error})", accepted) from error
        place = settings.config
        name = (place.parent if place.suffix == ".json" else place).resolve().name
    torch.manual_seed(0)
    try:
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=settings.dtype)
    except ValueError as error:
        accepted = "the config of a causal language model"
        raise ArgumentError("--config", f"{settings.config} ({error})", accepted) from error
    model.train()  # gradient checkpointing is off in evaluation; there is no dropout
    return name, model.requires_grad_(False)


@contextmanager
def _checkpointing(model: nn.Module, on: bool):
    if on:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    try:
        yield
    finally:
        if on:
            model.gradient_checkpointing_disable()


def _forward_backward(model, embeds, labels, autocast: torch.dtype | None) -> None:
    embeds.grad = None
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(labels.device.type, dtype=autocast))
        loss = model(inputs_embeds=embeds, labels=labels, use_cache=False).loss
    loss.backward()


# ---------------------------------------------------------------------- a variant


def _time(step: Callable, steps: int, device: torch.device) -> Timing:
    """``steps`` steps after one that warms up."""
    step()
    synchronize(device)
    timing = Timing()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        timing.seconds += sample(step, 1, device, flush=False)
    if device.type == "cuda":
        timing.peak_mib = torch.cuda.max_memory_allocated(device) / 2**20
    return timing


def _measure(method, device, *args) -> Timing:
    try:
        return _run(method, device, *args)
    except Exception as error:  # a variant that does not fit must not cost the others
        note = failure(error)
    free_memory(device)  # outside of the clause above, whose exception holds tensors
    return Timing(note=note)


def _run(method, device, names, model, embeds, labels, settings) -> Timing:
    chosen = _find(model, names)
    with method.attach(model, chosen, embeds, labels, settings) as step:
        step()  # the first step of Delta-LoRA leaves W alone
        return _time(step, settings.steps, device)


def _find(model: nn.Module, choices) -> list[str] | str:
    """The names of ``choices`` that the model has, for PEFT and `swap_` alike."""
    if choices is None:
        return "all-linear"
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in choices:
        if there.issuperset(names):
            return list(names)
    accepted = " or ".join(", ".join(names) for names in choices)
    raise ArgumentError("--targets", "q,v for a model without such layers", accepted)


def _adapter_dtype(method: Method, settings: Settings) -> str:
    own = {"peft": torch.float32, "peft-bf16": settings.dtype}
    return dtype_name(own.get(method.variant, settings.adapter_dtype))


def _fill(model: nn.Module) -> list[Tensor]:
    """The trainable parameters; none of them zero, for products with zeros are faster."""
    found = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in found:
            p.normal_(std=0.02)
    return found


@contextmanager
def _deltadiff(options, model, names, embeds, labels, settings):
    swap_(
        model, r=settings.r, lora_alpha=ALPHA, target_modules=names,
        adapter_dtype=settings.adapter_dtype,
    )  # fmt: skip
    try:
        _fill(model)
        optimizer = DeltaLoRA(model, lr=LR, **{"update_ratio": UPDATE_RATIO, **options})

        def step():
            _forward_backward(model, embeds, labels, None)
            optimizer.step()
            optimizer.zero_grad()

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", 'rounding="nearest" lost')
            yield step
    finally:
        unswap_(model)


@contextmanager
def _peft(same_dtype, naive, model, names, embeds, labels, settings):
    """Its default has float32 adapters and runs under autocast, as trainers do."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=settings.r, lora_alpha=ALPHA, target_modules=names)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=not same_dtype)
    try:
        params = _fill(wrapped)
        optimizer = torch.optim.AdamW(params, lr=LR, fused=True)
        half = settings.dtype in HALF_DTYPES
        autocast = settings.dtype if half and not same_dtype else None
        layers = [m for m in wrapped.modules() if hasattr(m, "lora_A")] if naive else []
        pairs = [(m.lora_B["default"].weight, m.lora_A["default"].weight) for m in layers]
        weights = [m.get_base_layer().weight for m in layers]
        scale = UPDATE_RATIO * ALPHA / settings.r

        def step():
            _forward_backward(wrapped, embeds, labels, autocast)
            old = [(b.detach().clone(), a.detach().clone()) for b, a in pairs]
            optimizer.step()
            with torch.no_grad():
                naive_update(weights, pairs, old, scale)
            optimizer.zero_grad()

        yield step
    finally:
        wrapped.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):  # or PEFT takes it for adapted
            model.__dict__.pop(name, None)
        model.requires_grad_(False)
