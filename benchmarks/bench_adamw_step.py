"""adamw_step_ on all adapter tensors of a model, beside torch.optim.AdamW."""

import pytest
from conftest import DEVICE

from deltadiff.bench.step import adamw_step_cases


@pytest.mark.parametrize("case", adamw_step_cases(DEVICE), ids=str)
def bench_adamw_step(compare, case):
    compare(case)
