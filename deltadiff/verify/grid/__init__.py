"""`deltadiff verify --full`: hundreds of random calls of every operation on every path.

`run.run_grid` runs them, and `run.Cell` is a row of what it finds. `draws` has the random choices,
`memory` the places of the tensors and what must not change beside them, and `paths` says which
kernels there are; there is one file of cases for each operation.
"""
