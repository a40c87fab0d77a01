"""Calls of `lora_linear` with random sizes and options, on every backend, against float64."""

import random

import pytest
from lora_linear_calls import doubles, inputs, outputs

from deltadiff import lora_linear
from deltadiff.ops.reference import lora_linear_ref


@pytest.mark.check(short=2, long=60)
def test_random_sizes_and_options(path, dtype, seed, randn, assert_close):
    random_ = random.Random(seed)
    m, k, n = (random_.randint(least, 150) for least in (1, 16, 16))  # the error of a few is luck
    r = random_.randint(1, min(k, n))
    gate, bias = random_.choice([None, (), (1,), (r,)]), random_.random() < 0.5
    for _ in range(random_.randrange(100)):  # other numbers for the same sizes
        randn(1)
    given = inputs(randn, m, k, n, r, dtype, path.device, gate=gate, bias=bias)
    ours = outputs(lora_linear, *given, backend=path.backend)
    eager, truth = outputs(lora_linear_ref, *given), outputs(lora_linear_ref, *doubles(given))
    for name in ("y", "x", "lora_A", "lora_B"):
        assert_close(ours[name], eager[name], truth[name], 2 if name == "y" else 3)
