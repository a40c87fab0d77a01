"""Optimizers: `FusedAdamW`, and the three training methods that extend its step.

Import `fused_adamw.FusedAdamW`, `delta_lora.DeltaLoRA`, `adalora.AdaLoRA` with `swap_adalora_`, and
`dylora.DyLoRA` with `truncate_`. The other files are their parts.
"""
