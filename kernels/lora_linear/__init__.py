"""The kernels of `lora_linear`: y = x W^T + bias + s g (x A^T) B^T, and its gradients.

`portable.py` runs on any GPU and in Triton's interpreter; it passes calls with few tokens on to
`few_tokens.py`. `hopper_launch.py` is for sm_90, with the kernel in `hopper.py`, `producer.py`,
`consumer.py` and `schedule.py`; `hopper_plan.py` lets C++ repeat its launches. The two launchers
have the same functions, `lora_linear_fwd` and `lora_linear_bwd`. `deltadiff.ops` imports the
launchers and the plan.
"""
