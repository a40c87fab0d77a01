"""delta_update_ on a list of weights, beside eager PyTorch and a copy of as many bytes."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import step_cases

CASES = [case for case in step_cases(DEVICE) if case.fields["op"] == "delta_update"]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_delta_update(compare, case):
    compare(case)
