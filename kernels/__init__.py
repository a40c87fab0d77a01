"""The Triton and Gluon kernels of deltadiff, imported as `deltadiff.kernels`.

`lora_linear/`, `delta_update.py`, `adamw_step.py` and `step_counters.py` have one operation each:
its kernels and the functions that launch them, which `deltadiff.ops` calls with checked arguments.
`runtime/` has what they share. Nothing here imports other parts of deltadiff.

To add a kernel, write a file like `adamw_step.py`, call it from `deltadiff/ops`, and add its launch
to `tests/kernels/test_compile_offline.py`. If it is worth tuning, declare a `LaunchConfig` beside
its default configuration and list it in `launch_configs.py`.
"""

if __name__ != "deltadiff.kernels":
    # A Hugging Face package is called `kernels` too; without this error, the folder would hide it.
    raise ImportError("this folder is deltadiff.kernels; install deltadiff and import that")
