"""Layers with a low-rank branch: how they are put into a model, taken out, merged, and saved.

`lora_linear.py` holds the layer, `swap.py` puts it in, `merge.py` folds it into the base weight,
`adapter_file.py` saves and loads what was trained. `base_format.py` is the one table of how a base
weight may be stored, `adapter_format.py` the one description of an adapter file. PEFT's adapter
files are written by `export_peft.py` and read by `read_peft.py` and `load_peft.py`, without PEFT;
`peft_names.py` has its rules of names, `peft_heads.py` what it saves beside the pairs. Other rooms
import the public names of these files; the root package exports those that users need.
"""
