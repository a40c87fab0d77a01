"""Methods of other libraries: PEFT's LoRA, and the bottleneck adapters of AdapterHub."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...checks import need_package
from ...errors import ArgumentError
from ..inputs import RunInputs
from ..training_setup import TrainingSetup
from .targets import find_targets
from .whole_model import adamw, train_parameters

if TYPE_CHECKING:
    from ..settings import Settings


def peft_lora(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    """PEFT's eager layers and torch's AdamW."""
    peft = need_package("peft", extra=None, argument="method")
    model = inputs.model
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.lora_dropout,
        use_rslora=settings.use_rslora,
        target_modules=find_targets(settings, model.module),
        modules_to_save=list(model.head) or None,
        task_type=model.task.peft_type,
    )  # fmt: skip
    try:
        module = peft.get_peft_model(model.module, config)
    except ValueError as error:
        raise ArgumentError("target_modules", settings.target_modules, str(error)) from error

    def load(folder: Path) -> None:
        saved = peft.load_peft_weights(str(folder), device="cpu")
        peft.set_peft_model_state_dict(module, saved)

    return TrainingSetup(module, adamw(module.parameters(), settings), module.save_pretrained, load)


def houlsby(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    return _bottleneck(inputs, settings, "double_seq_bn")


def pfeiffer(inputs: RunInputs, settings: "Settings") -> TrainingSetup:
    return _bottleneck(inputs, settings, "seq_bn")


def _bottleneck(inputs: RunInputs, settings: "Settings", config: str) -> TrainingSetup:
    """Bottleneck adapters of AdapterHub's library in the standard form named ``config``."""
    try:
        import adapters
    except ImportError as error:
        accepted = "AdapterHub's `adapters`, and the transformers that it asks for"
        reason = _why_no_adapters(error)
        raise ArgumentError("method", f"{settings.method}: {reason}", accepted) from error
    module = inputs.model.module
    adapters.init(module)
    module.add_adapter("task", config=config)
    module.train_adapter("task")
    module.to(inputs.device)
    if module.can_generate():  # adapters 1.3 drops Llama's key-value cache without a word
        module.generation_config.use_cache = False
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    return train_parameters(inputs, settings, trained)


def _why_no_adapters(error: ImportError) -> str:
    try:
        here = metadata.version("adapters")
    except metadata.PackageNotFoundError:
        return "adapters is not installed"
    asks = [r for r in metadata.requires("adapters") or () if r.startswith("transformers")]
    reason = str(error).partition(" (")[0]  # without the path that follows
    wanted = f"it asks for {asks[0]}; here is {metadata.version('transformers')}" if asks else ""
    return f"adapters {here} does not load ({reason}); {wanted}"
