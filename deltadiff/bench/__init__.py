"""`deltadiff bench`: time and memory of a layer, the optimizer step, a model or a search.

A benchmark is a list of `timing.Case`; `timing.compare` measures one and returns its records.
`layer`, `step` (with its parts, `delta_update` and `adamw_step`) and `search` hold cases; `model`
measures whole models, which are too large to stand beside each other. `clocks` measures a single
call, `records` and `report` write and word what was measured. `tuning` uses these too.
"""
