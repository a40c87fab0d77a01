"""PEFT's adapter files: written and read without PEFT.

`export.export_peft` writes any model of ours as an adapter for its original base, `load.load_peft`
puts PEFT's plain LoRA on an eager model. `read.py` checks what is on the disk, `names.py` has
PEFT's rules of names, and `heads.py` what it saves beside the pairs.
"""
