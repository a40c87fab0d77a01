"""The launch configuration of every tunable kernel, by its name in tables."""

from .delta_update import DELTA_UPDATE
from .lora_linear.few_tokens import FEW
from .lora_linear.hopper_config import HOPPER
from .lora_linear.portable_config import DOWN, FWD, WGRAD

LAUNCH_CONFIGS = {c.op: c for c in (DOWN, FWD, FEW, WGRAD, HOPPER, DELTA_UPDATE)}
