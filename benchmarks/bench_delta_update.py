"""delta_update_ on a list of weights, beside eager PyTorch and a copy of as many bytes."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import delta_update_cases


@pytest.mark.parametrize("case", delta_update_cases(DEVICE), ids=str)
def bench_delta_update(compare, case):
    compare(case)
