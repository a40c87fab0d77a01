"""The whole optimizer step, beside AdamW of PyTorch and an update of W by hand."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import step_cases

CASES = [case for case in step_cases(DEVICE) if case.fields["op"] == "step"]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_step(compare, case):
    compare(case)
