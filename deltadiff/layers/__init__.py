"""Layers with a low-rank branch: how they are put into a model, taken out, merged, and saved.

`lora_linear.py` holds the layer, `targets.py` chooses where it goes (`eligible.py`, `heads.py` and
`weight_readers.py` tell where it must not), `swap.py` puts it in, `report.py` and `coverage.py` say
what was done and what was not, `merge.py` folds it into the base weight, `adapter_file.py` saves
and loads what was trained. `base_format.py` is the one table of how a base weight may be stored,
`adapter_format.py` the one description of an adapter file. `lora_layers.py` shows all layers alike,
ours and PEFT's. The folder `peft` makes PEFT's own layers faster, and `peft_files` writes and reads
its files. Other rooms import the public names of these files; the root package exports those that
users need.
"""
