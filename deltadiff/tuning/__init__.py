"""`deltadiff tune`: find the launch configurations that are fastest on this GPU and keep them.

`cases` holds the calls that are tuned, `sweep` times candidates for them, and `table` writes those
that win. Kernels read the table through `deltadiff.kernels.runtime.tuned`. Other rooms import
nothing from here. Only `command` can be imported without Triton.
"""
