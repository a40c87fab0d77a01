"""This library's adapter files: `adapter_file.py` saves and loads, `format.py` describes them.

`entries.py` is what they hold of each layer, and `base.py` tells whether an adapter fits a model.
"""
