"""The whole optimizer step, beside AdamW of PyTorch and an update of W by hand."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import whole_step_cases


@pytest.mark.parametrize("case", whole_step_cases(DEVICE), ids=str)
def bench_step(compare, case):
    compare(case)
