"""A step of DiffoRA's search, beside a frozen model and the same step in eager PyTorch."""

import pytest
from conftest import DEVICE

from deltadiff.bench.search import search_cases


@pytest.mark.parametrize("case", search_cases(DEVICE), ids=str)
def bench_search(compare, case):
    compare(case)
