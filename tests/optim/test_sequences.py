"""Random sequences of everything that can happen to a `DeltaLoRA`, against Algorithm 1.

The algorithm is plain PyTorch in float64 (tests/support/algorithm_1.py). hypothesis draws the
sequences and shortens one that fails.
"""

import hypothesis
import pytest
from sequences import PLANS, run_plan

SEQUENCES = 100  # for each seed


@pytest.mark.check(short=3, long=50)
def test_a_model_is_what_algorithm_1_makes_of_it(seed, tally):
    done = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=SEQUENCES, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(PLANS)
    def check(plan):
        run_plan(plan)
        done.append(plan)

    check()
    tally("sequences", "DeltaLoRA against Algorithm 1", len(done))
