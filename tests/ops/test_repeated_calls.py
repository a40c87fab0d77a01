"""Arguments that were checked before are not checked again, as long as they are the same."""

import pytest
import torch

from deltadiff import adamw_step_, delta_update_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops import adamw_step, delta_update

COLUMNS = 83  # in no other test, whose tensors could have had the same addresses


@pytest.fixture
def checks(monkeypatch):
    """A list with an entry for each time that lists of tensors were checked."""
    made = []
    for module in (adamw_step, delta_update):
        name = f"check_{module.__name__.rpartition('.')[2]}"
        check = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, check=check, name=name: made.append(name) or check(*args)
        )
    return made


def adamw_lists():
    return [[torch.ones(3, COLUMNS) for _ in range(2)] for _ in range(4)]


def test_adamw_step_checks_the_same_tensors_once(checks):
    lists, steps = adamw_lists(), torch.zeros(2)
    for lr in (0.1, 0.2):
        adamw_step_(*lists, steps, lr=lr)
    assert len(checks) == 1 and steps.tolist() == [2, 2]
    with pytest.raises(ArgumentError, match="lr"):
        adamw_step_(*lists, steps, lr=-1.0)
    lists[1][0] = torch.ones(3, COLUMNS)
    adamw_step_(*lists, steps, lr=0.1)
    assert len(checks) == 2
    lists[2][1] = torch.ones(3, COLUMNS - 1)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="exp_avgs"):
            adamw_step_(*lists, steps, lr=0.1)
    with pytest.raises(ArgumentError, match="grads"):
        adamw_step_(lists[0], lists[1][:1], *adamw_lists()[2:], steps, lr=0.1)


def test_delta_update_checks_the_same_tensors_once(checks):
    w = [torch.zeros(6, COLUMNS) for _ in range(2)]
    factors = [[torch.ones(2, COLUMNS)] * 2, [torch.ones(6, 2)] * 2]
    for scale in (1.0, 1.0, 2):
        delta_update_(w, *factors, *factors, scale=scale)
    assert len(checks) == 2 and torch.equal(w[0], w[1]) and (w[0] == 8).all()
    for scale, error in (
        (float("nan"), ArgumentError), (True, ArgumentTypeError), ("1", ArgumentTypeError),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(error, match="scale"):
                delta_update_(w, *factors, *factors, scale=[1.0, scale])
    with pytest.raises(ArgumentTypeError, match="seed"):
        delta_update_(w, *factors, *factors, scale=1.0, seed=0.0)
