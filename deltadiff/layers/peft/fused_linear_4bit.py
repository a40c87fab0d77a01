"""`FusedLinear4bit`; imported when the first such layer is met, for it imports bitsandbytes."""

from peft.tuners.lora.bnb import Linear4bit

from .fused_linear import Fused


class FusedLinear4bit(Fused, Linear4bit):
    """PEFT's layer on a ``bitsandbytes.nn.Linear4bit``."""

    peft_class = Linear4bit
