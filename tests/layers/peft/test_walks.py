"""Whatever calls of PEFT come one after the other, a swapped model does as PEFT's does."""

import pytest
from peft_delta_walk import DeltaWalk
from peft_walk import Walk

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about these calls


@pytest.mark.check(short=4, long=300)
def test_random_calls(seed):
    walk = Walk(seed)
    for _ in range(25):
        walk.step()
    assert walk.fused >= 2


@pytest.mark.parametrize("w_update", ["factored", "inplace"])
@pytest.mark.check(short=3, long=200)
def test_random_calls_between_steps_of_delta_lora(seed, w_update):
    walk = DeltaWalk(seed, w_update)
    for _ in range(30):
        walk.step()
    for _ in range(3):
        walk.train()
        walk.compare()
    assert walk.updates and (w_update == "inplace" or not walk.refused)
