"""PEFT's LoRA layers: they stay PEFT's own modules and get a faster forward pass.

`fuse.fuse_` makes the class of a layer a subclass of its own class: those of `fused_linear`, or
`fused_linear_4bit.FusedLinear4bit` on weights of bitsandbytes. Parameters, names, state dict,
adapters, merging and switching stay PEFT's; there is no second copy of any state.
`rules.why_peft` decides which calls `lora_linear` computes; PEFT's own forward pass computes all
others. `pair.PeftPair` shows one adapter of a layer as a `LoraLayer`. The models of tuners around
the layers become those of `tuner_models`, which ask before an update would be lost.

This folder is imported when the first layer of PEFT is met, for it imports PEFT.
"""
