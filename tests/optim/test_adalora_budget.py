"""How many triplets AdaLoRA keeps in which step, and which ones."""

import torch

from deltadiff.optim.adalora_budget import Schedule, largest


def test_budget_schedule():
    schedule = Schedule(total_step=100, target_r=8, tinit=10, tfinal=30)
    assert [schedule.budget(t, 144, 96) for t in (0, 1, 10)] == [144] * 3
    assert [schedule.budget(t, 144, 96) for t in (70, 71, 100, 500)] == [96] * 4
    assert schedule.budget(40, 144, 96) == 96 + 6  # half way, 48 / 8 are left
    budgets = [schedule.budget(t, 144, 96) for t in range(101)]
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 20
    exact = Schedule(total_step=10, target_r=1)  # 1000 * 0.7^3 = 343, which floats can miss
    assert exact.budget(3, 1000, 0) == 343
    every = Schedule(total_step=100, tinit=10, tfinal=30, deltaT=7)
    assert [t for t in range(30) if every.chooses(t)] == [14, 21, 28]
    assert every.chooses(70) and every.chooses(99) and not every.chooses(69)


def test_largest_keeps_exactly_as_many_and_the_first_of_equals():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert largest(scores, torch.tensor(3)).tolist() == [False, True, True, True, False, False]
    assert largest(scores, torch.tensor([0])).sum() == 0
    assert largest(torch.zeros(5), torch.tensor(2)).tolist() == [True, True, False, False, False]
