"""deltadiff: fused kernels for Delta-LoRA and DiffoRA fine-tuning."""

from importlib import metadata

from . import diffora
from .layers.adapter_files.adapter_file import load_adapter, save_adapter
from .layers.lora_linear import LoraLinear
from .layers.merge import merge_
from .layers.peft_files.export import export_peft
from .layers.quantise import quantise_
from .layers.report import swap_report
from .layers.swap import swap_, unswap_
from .ops.adamw_step import adamw_step_
from .ops.delta_update import delta_update_
from .ops.dispatch import choose_path
from .ops.lora_linear import lora_linear
from .optim.delta_lora import DeltaLoRA
from .optim.fused_adamw import FusedAdamW

__version__ = metadata.version("deltadiff")

__all__ = [
    "DeltaLoRA",
    "FusedAdamW",
    "LoraLinear",
    "adamw_step_",
    "choose_path",
    "delta_update_",
    "diffora",
    "export_peft",
    "load_adapter",
    "lora_linear",
    "merge_",
    "quantise_",
    "save_adapter",
    "swap_",
    "swap_report",
    "unswap_",
]
