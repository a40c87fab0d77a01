"""The operations, one file each: its public function, its checks, its gradients.

`reference` specifies what each of them computes, and `dispatch` alone decides which kernel runs a
call. Other rooms import the functions, `dispatch.choose_path` and `backends.why_unavailable`, the
prepared forms (`prepare_...`) and `step_counters` for optimizers, and `reference` to check results.
"""
