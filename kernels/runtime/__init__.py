"""What the kernels and their launchers share. Any kernel may import any of it.

Device functions: `rounding.py`, `float32_product.py`, `philox.py`. Launches: `cached_launch.py`,
`launch_cache.py`, `tuned.py`, `plan.py`, `multi_tensor.py`. The table of dtypes: `dtypes.py`.
Device facts and copies: `gpu.py`, `async_copy.py`. Other parts of deltadiff import these three and
`launch_cache.py` too, as they need no Triton.
"""
