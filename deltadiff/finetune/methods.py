"""What `--method` names: for each method, how a model is prepared and what trains it.

A method is one function of a task and the settings, and a row in METHODS. The head that a
classifier gets is trained whole under all of them. What is trained is kept in float32 where the
model runs in 16 bits.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import diffora
from ..errors import ArgumentError, CheckpointError
from ..layers.adapter_file import load_adapter, save_adapter
from ..layers.swap import swap_
from ..optim.adalora import AdaLoRA, swap_adalora_
from ..optim.delta_lora import DeltaLoRA
from ..optim.dylora import DyLoRA
from .diffora_stage import search_stage
from .models import query_value
from .training import FirstStage, Task, TrainingSetup

if TYPE_CHECKING:
    from .settings import Settings


def find_targets(settings: "Settings", module: nn.Module) -> str | list[str]:
    """The layers that get a pair, as `swap_` takes them."""
    if settings.target_modules == "qv":
        return query_value(module)
    all_linear = settings.target_modules == "all-linear"
    return settings.target_modules if all_linear else settings.target_modules.split(",")


# ---------------------------------------------------------------------- fused layers


def _swapped(task: Task, settings: "Settings", alpha: float) -> nn.Module:
    module = task.model.module
    print(
        swap_(
            module, r=settings.r, lora_alpha=alpha, target_modules=find_targets(settings, module),
            lora_dropout=settings.lora_dropout, use_rslora=settings.use_rslora,
            modules_to_save=task.model.head, seed=settings.seed,
        )
    )  # fmt: skip
    return module


def _refuse(settings: "Settings", *names: str) -> None:
    """Options of the low-rank branch that a method has not."""
    for name in names:
        value = getattr(settings, name)
        if value:
            raise ArgumentError(name, value, f"{type(value)()} for method {settings.method}")


def _adapter(module: nn.Module, optimizer: torch.optim.Optimizer, **more) -> TrainingSetup:
    return TrainingSetup(
        module, optimizer,
        save=lambda folder: save_adapter(module, folder),
        load=lambda folder: load_adapter(module, folder), **more,
    )  # fmt: skip


def _plain(module: nn.Module, settings: "Settings") -> TrainingSetup:
    """AdamW, and W stays as it is."""
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return _adapter(module, DeltaLoRA(module, **options, update_ratio=0.0))


def _with_deltas(module: nn.Module, settings: "Settings") -> TrainingSetup:
    optimizer = DeltaLoRA(
        module, lr=settings.lr, weight_decay=settings.weight_decay,
        update_ratio=settings.update_ratio, start_step=settings.start_step,
        w_update=settings.w_update, rounding=settings.rounding, seed=settings.seed,
    )  # fmt: skip
    return _adapter(module, optimizer)


def _lora(task: Task, settings: "Settings") -> TrainingSetup:
    return _plain(_swapped(task, settings, settings.alpha), settings)


def _lora_alpha_control(task: Task, settings: "Settings") -> TrainingSetup:
    """Delta-LoRA under Adam is this, but for the steps before K."""
    alpha = settings.alpha * (1 + settings.update_ratio)
    return _plain(_swapped(task, settings, alpha), settings)


def _delta_lora(task: Task, settings: "Settings") -> TrainingSetup:
    _refuse(settings, "lora_dropout")
    return _with_deltas(_swapped(task, settings, settings.alpha), settings)


def _adalora(task: Task, settings: "Settings") -> TrainingSetup:
    """r is the average rank at the end; the branch is scaled by alpha / r from the start."""
    _refuse(settings, "lora_dropout", "use_rslora")
    module, steps = task.model.module, settings.steps
    init_r = settings.init_r or -(-3 * settings.r // 2)
    print(
        swap_adalora_(
            module, init_r=init_r, lora_alpha=settings.alpha * init_r / settings.r,
            target_modules=find_targets(settings, module), modules_to_save=task.model.head,
            seed=settings.seed,
        )
    )  # fmt: skip
    optimizer = AdaLoRA(
        module, lr=settings.lr, weight_decay=settings.weight_decay, total_step=steps,
        target_r=settings.r, tinit=steps // 10, tfinal=steps // 2, deltaT=settings.deltaT,
    )  # fmt: skip
    return _adapter(module, optimizer, penalty=optimizer.orthogonality)


def _dylora(task: Task, settings: "Settings") -> TrainingSetup:
    """Ranks 1 to r are trained; the model is used at rank r."""
    module = _swapped(task, settings, settings.alpha)
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay, "seed": settings.seed}
    optimizer = DyLoRA(module, **options)
    return _adapter(module, optimizer, evaluating=lambda: optimizer.truncated(settings.r))


# --------------------------------------------------------------------------- DiffoRA


def _second_stage(
    task: Task, settings: "Settings", selection: diffora.Selection, search: diffora.Search | None
) -> nn.Module:
    module = task.model.module
    print(
        diffora.apply_(
            module, selection, r=settings.r, lora_alpha=settings.alpha,
            share_r=settings.share_r or 1, share=settings.share_r > 0, warm_start=search,
            lora_dropout=settings.lora_dropout, modules_to_save=task.model.head,
            seed=settings.seed,
        )
    )  # fmt: skip
    return module


def _search_then(train: Callable[[nn.Module, "Settings"], TrainingSetup], *refused: str):
    """A method that searches, and trains what was selected with ``train``."""

    def prepare(task: Task, settings: "Settings") -> FirstStage:
        _refuse(settings, "use_rslora", *refused)
        targets = find_targets(settings, task.model.module)

        def second(*found) -> TrainingSetup:
            return train(_second_stage(task, settings, *found), settings)

        return search_stage(task, settings, targets, second)

    return prepare


def _diffora_random(task: Task, settings: "Settings") -> TrainingSetup:
    """The control: as many modules of each layer, at random, and no search."""
    _refuse(settings, "use_rslora", "warm_start")
    module = task.model.module
    targets = find_targets(settings, module)
    candidates = diffora.find_candidates(module, targets, task.model.head)
    selection = diffora.random_selection(candidates, settings.ratio, settings.seed)
    return _plain(_second_stage(task, settings, selection, None), settings)


# ------------------------------------------------------------------ parts of the model


def _whole(task: Task, settings: "Settings", chosen: Collection[str]) -> TrainingSetup:
    """Train the parameters named ``chosen`` themselves, and the head, with torch's AdamW."""
    module = task.model.module
    if not chosen:
        given = f"{settings.method}, of whose parameters this model has none"
        raise ArgumentError("method", given, "another method for this model")
    head = {n for n in _names(module) if n.partition(".")[0] in task.model.head}
    module.requires_grad_(False)
    for prefix, owner in module.named_modules():
        own = dict(owner.named_parameters(prefix, recurse=False))
        trained = [p for name, p in own.items() if name in head or name in chosen]
        if trained and not isinstance(owner, nn.Linear | nn.Embedding):
            owner.float()  # a normalisation takes its weight and bias in one dtype
        for p in trained:
            p.data = p.data.float()
            p.requires_grad_(True)
    return TrainingSetup(
        module,
        _adamw(module.parameters(), settings),
        save=lambda folder: _save_trained(module, folder),
        load=lambda folder: _load_trained(module, folder),
        keep=lambda folder: _save_model(task, folder),
    )


def _names(module: nn.Module) -> list[str]:
    """Of the parameters; one that stands in two places has the first name only."""
    return [name for name, _ in module.named_parameters()]


def _save_trained(module: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    save_file(trained, folder / "trained.safetensors")


def _save_model(task: Task, folder: Path) -> None:
    """As transformers loads it."""
    task.model.module.save_pretrained(folder)
    task.model.tokenizer.save_pretrained(folder)


@torch.no_grad()
def _load_trained(module: nn.Module, folder: Path) -> None:
    tensors = load_file(folder / "trained.safetensors")
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        raise CheckpointError(str(folder), "other parameters", "those that this method trains")
    for name, p in trained.items():
        p.copy_(tensors[name])


def _full(task: Task, settings: "Settings") -> TrainingSetup:
    return _whole(task, settings, _names(task.model.module))


def _full_no_embeddings(task: Task, settings: "Settings") -> TrainingSetup:
    """An output layer that is tied to the embeddings is frozen with them."""
    module = task.model.module
    tables = {n for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    return _whole(task, settings, [n for n in _names(module) if n.rpartition(".")[0] not in tables])


def _full_qv(task: Task, settings: "Settings") -> TrainingSetup:
    """The matrices alone, as the names W_Q and W_V say."""
    return _whole(task, settings, [f"{name}.weight" for name in query_value(task.model.module)])


def _bitfit(task: Task, settings: "Settings") -> TrainingSetup:
    names = [n for n in _names(task.model.module) if n.rpartition(".")[2] == "bias"]
    return _whole(task, settings, [n for n in names if n.partition(".")[0] not in task.model.head])


# ------------------------------------------------------------------ through libraries


PEFT_TASKS = {
    "text": "CAUSAL_LM", "class": "SEQ_CLS", "number": "SEQ_CLS", "span": "QUESTION_ANS",
}  # fmt: skip


def _peft_lora(task: Task, settings: "Settings") -> TrainingSetup:
    """PEFT's eager layers and torch's AdamW."""
    try:
        import peft
    except ImportError as error:
        raise ArgumentError("method", error, "an installed peft: pip install peft") from error
    model = task.model
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=find_targets(settings, model.module),
        modules_to_save=list(model.head) or None,
        task_type=PEFT_TASKS[model.kind],
    )  # fmt: skip
    try:
        module = peft.get_peft_model(model.module, config)
    except ValueError as error:
        raise ArgumentError("target_modules", settings.target_modules, str(error)) from error

    def load(folder: Path) -> None:
        saved = peft.load_peft_weights(str(folder), device="cpu")
        peft.set_peft_model_state_dict(module, saved)

    return TrainingSetup(
        module, _adamw(module.parameters(), settings), module.save_pretrained, load
    )


def _adapter_hub(config: str) -> Callable[[Task, "Settings"], TrainingSetup]:
    """Bottleneck adapters of AdapterHub's library in their standard form."""

    def prepare(task: Task, settings: "Settings") -> TrainingSetup:
        try:
            import adapters
        except ImportError as error:
            accepted = "AdapterHub's `adapters`, and the transformers that it asks for"
            reason = _why_no_adapters(error)
            raise ArgumentError("method", f"{settings.method}: {reason}", accepted) from error
        module = task.model.module
        adapters.init(module)
        module.add_adapter("task", config=config)
        module.train_adapter("task")
        module.to(task.device)
        if module.can_generate():  # adapters 1.3 drops Llama's key-value cache without a word
            module.generation_config.use_cache = False
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        return _whole(task, settings, trained)

    return prepare


def _why_no_adapters(error: ImportError) -> str:
    try:
        here = metadata.version("adapters")
    except metadata.PackageNotFoundError:
        return "adapters is not installed"
    asks = [r for r in metadata.requires("adapters") or () if r.startswith("transformers")]
    reason = str(error).partition(" (")[0]  # and not the path after it
    wanted = f"it asks for {asks[0]}; here is {metadata.version('transformers')}" if asks else ""
    return f"adapters {here} does not load ({reason}); {wanted}"


def _adamw(params: Iterable[nn.Parameter], settings: "Settings") -> torch.optim.AdamW:
    params = [p for p in params if p.requires_grad]
    on_gpu = params[0].is_cuda
    return torch.optim.AdamW(params, settings.lr, weight_decay=settings.weight_decay, fused=on_gpu)


# ------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Method:
    """``text`` says what it is; ``fixes``: the settings that the name stands for."""

    text: str
    prepare: Callable[[Task, "Settings"], TrainingSetup | FirstStage]
    fixes: Mapping[str, object] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "full": Method("Full fine-tuning", _full),
    "full-no-embeddings": Method("Full, embeddings frozen", _full_no_embeddings),
    "full-qv": Method("W_Q and W_V only", _full_qv),
    "bitfit": Method("BitFit: biases only", _bitfit),
    "houlsby": Method("Houlsby adapters", _adapter_hub("double_seq_bn")),
    "pfeiffer": Method("Pfeiffer adapters", _adapter_hub("seq_bn")),
    "lora-peft": Method("LoRA, PEFT eager", _peft_lora),
    "lora": Method("LoRA", _lora),
    "lora-alpha-control": Method("LoRA at alpha (1 + lambda)", _lora_alpha_control),
    "adalora": Method("AdaLoRA", _adalora),
    "dylora": Method("DyLoRA", _dylora),
    "delta-lora": Method("Delta-LoRA in place", _delta_lora),
    "delta-lora-nearest": Method(
        "Delta-LoRA in place, nearest", _delta_lora, {"w_update": "inplace", "rounding": "nearest"}
    ),
    "delta-lora-factored": Method("Delta-LoRA factored", _delta_lora, {"w_update": "factored"}),
    "diffora": Method("DiffoRA", _search_then(_plain)),
    "diffora-no-sharing": Method("DiffoRA without sharing", _search_then(_plain), {"share_r": 0}),
    "diffora-random": Method("DiffoRA's control: modules at random", _diffora_random),
    "diffora-delta-lora": Method(
        "DiffoRA + Delta-LoRA", _search_then(_with_deltas, "lora_dropout")
    ),
}
