"""Calls of `lora_linear` on the sm_90 kernel, for tests that need a GPU which has it."""

import pytest
import torch
from lora_linear_calls import doubles, outputs

from deltadiff import lora_linear
from deltadiff.ops.reference import lora_linear_ref


def on_hopper(test):
    """Mark a test that needs a GPU of compute capability 9.0."""
    other = torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0)
    needs = pytest.mark.skipif(other, reason="needs a GPU of compute capability 9.0")
    return pytest.mark.gpu(needs(test))


def run(given, function=lora_linear, **options):
    """y and the gradients, by backend "hopper" unless another function or backend is given."""
    options = {"backend": "hopper", **options} if function is lora_linear else options
    return outputs(function, *given, **options)


def check(assert_close, draws, dtype, function=run):
    """Compare outputs and gradients for lists of inputs, each measured over all of the lists."""
    found, eager, truth = (
        [run_one(given) for given in draws]
        for run_one in (
            function,
            lambda given: run(given, lora_linear_ref),
            lambda given: run(doubles(given), lora_linear_ref),
        )
    )
    for name in truth[0]:
        columns = [torch.stack([draw[name] for draw in side]) for side in (found, eager, truth)]
        assert_close(*columns, 2 if name == "y" else 3, dtype if name == "gate" else None)
