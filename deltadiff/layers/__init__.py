"""Layers with a low-rank branch: how they are put into a model, taken out, merged, and saved.

`lora_linear.py` holds the layer, `swap.py` puts it where the folder `targets` says, `merge.py`
folds it into the base weight, and `report.py` and `coverage.py` say what was done and what was not.
`flora.py` swaps in layers with FLoRA's cores, and `gate.py` knows what stands between two factors.
`lora_layers.py` shows all layers alike, ours and PEFT's; `base_format.py` is the one table of how a
base weight may be stored; `four_bit.py` knows bitsandbytes' layers, `fp8.py` those in FP8, and
`quantise.py` makes such ones. The folder `adapter_files` saves and loads what was trained,
`peft_files` writes and reads PEFT's files, `peft` makes PEFT's own layers faster, and `lean` lets
the blocks around the layers keep less for the backward pass.
Other rooms import the public names of these files; the root package exports those that users need.
"""
