"""Where pairs go: `choose.choose_modules` finds the layers that ``target_modules`` names.

`eligible.py` and `weight_readers.py` tell which layers cannot be taken and why, `heads.py` finds
new heads, and `trained.py` tells what trains whole.
"""
