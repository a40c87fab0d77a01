"""`deltadiff bench`: time and memory of a layer, the optimizer step, a model or a search.

A benchmark is a list of `timing.Case`; `timing.compare` measures one and returns its records.
`layer`, `blocks`, `quantised`, `step` (with its parts, `delta_update` and `adamw_step`) and
`search` hold cases. `model` measures whole models, which are too large to be in memory at the same
time, by the `methods` of this process and by peers in `own_process`. `clocks` times a call,
`records` writes files, `report` and `plots` show them, `fp8_accuracy` those of the command of this
name in benchmarks/. `tuning` imports some of these too.
"""
