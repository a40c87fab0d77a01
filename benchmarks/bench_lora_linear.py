"""lora_linear, forward and forward + backward, beside a frozen layer, eager PyTorch and PEFT."""

import pytest
from conftest import DEVICE

from deltadiff.bench.layer import COMPILED, VARIANTS, layer_cases

WANTED = [name for name in VARIANTS if name != COMPILED]  # compiling takes longer than the rest


@pytest.mark.parametrize("case", layer_cases(DEVICE), ids=str)
def bench_lora_linear(compare, case):
    compare(case, WANTED)
