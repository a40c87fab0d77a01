"""adamw_step_ on all adapter tensors of a model, beside torch.optim.AdamW."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import step_cases

CASES = [case for case in step_cases(DEVICE) if case.fields["op"] == "adamw_step"]


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_adamw_step(compare, case):
    compare(case)
