"""Whatever calls of PEFT come one after the other, the swapped model does as PEFT's does."""

import pytest
from peft_walk import Walk


@pytest.mark.filterwarnings("ignore")  # PEFT's own, about these calls
@pytest.mark.check(short=4, long=300)
def test_random_calls(seed):
    walk = Walk(seed)
    for _ in range(25):
        walk.step()
    assert walk.fused >= 2
