"""The losses that a search reads late: what is read, and what a failed step leaves."""

import math

import pytest
import torch

from deltadiff.diffora.step_log import Step, StepLog


def take(log: StepLog, number: int, loss: float, grad: float = 1.0) -> None:
    log.judge(torch.tensor(loss), [torch.tensor([0.0, grad])])
    log.note((0, number - 1), (0, number), torch.tensor(loss))


def test_steps_are_read_together_when_they_are_due():
    log = StepLog(torch.device("cpu"))
    assert log.read() == [] and log.read_every == 1
    log.read_every = 2
    take(log, 1, 0.5)
    assert not log.due
    take(log, 2, 0.25)
    assert log.due
    steps = [Step((0, 0), (0, 1), 0.5, False), Step((0, 1), (0, 2), 0.25, False)]
    assert log.read() == steps and log.read() == [] and not log.due


@pytest.mark.parametrize(("loss", "grad"), [(math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan)])
def test_a_failed_step_is_the_last_that_is_read(loss, grad):
    log = StepLog(torch.device("cpu"))
    take(log, 1, 0.5)
    assert log.failed == 0
    take(log, 2, loss, grad)
    assert log.failed != 0
    take(log, 3, 0.25)  # this step is not taken either
    assert log.failed != 0
    first, second = log.read()
    assert not first.failed and second.failed
    assert second.before == (0, 1) and math.isfinite(second.loss) == math.isfinite(loss)
    assert log.failed == 0 and log.read() == []


def test_clear_forgets_a_failed_step():
    log = StepLog(torch.device("cpu"))
    take(log, 1, math.nan)
    log.clear()
    assert log.failed == 0 and log.read() == []
