"""deltadiff: fused kernels for Delta-LoRA and DiffoRA fine-tuning."""

from . import diffora
from .checkpoint import load_adapter, save_adapter
from .delta_lora import DeltaLoRA
from .lora import LoraLinear
from .merge import merge_
from .ops import adamw_step_, delta_update_, lora_linear
from .paths import choose_path
from .swap import swap_, swap_report, unswap_

__version__ = "0.1.0"

__all__ = [
    "DeltaLoRA",
    "LoraLinear",
    "adamw_step_",
    "choose_path",
    "delta_update_",
    "diffora",
    "load_adapter",
    "lora_linear",
    "merge_",
    "save_adapter",
    "swap_",
    "swap_report",
    "unswap_",
]
