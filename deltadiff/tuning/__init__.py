"""`deltadiff tune`: find the launch configurations that are fastest on this GPU and keep them.

`cases` says what is tuned, `sweep` times candidates, `table` writes what was found. Kernels read
the table through `deltadiff.kernels.runtime.tuned`. Only `command` can be imported without Triton.
"""
