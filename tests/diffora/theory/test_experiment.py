"""The network of equation 3: its loss, its kernel, and what is counted over draws."""

import math

import pytest
import torch

from deltadiff.diffora import compare_grams
from deltadiff.diffora.theory.experiment import SETTINGS, Problem, Size, count, run_one, train

SMALL = Size(points=4, inputs=6, hidden=512, steps=40, draws=3, samples=2000)


def test_points_have_norm_1_and_a_seed_fixes_a_draw():
    for setting in SETTINGS:
        one, again = (setting.draw(4, 6, 5) for _ in range(2))
        torch.testing.assert_close(one.x.norm(dim=1), torch.ones(4).double())
        assert one.x.equal(again.x) and one.y.abs().max() <= 1
        assert 0 < one.selection.sum() < 6
        assert one.w0.any().item() is (setting.frozen != "w0 = 0")


def test_one_point_is_learnt_at_the_rate_of_its_kernel():
    """n = 1: (u - y)' = -K (u - y) with K = |x|^2 times the share of neurons that are on."""
    x, y = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([1.0]).double()
    problem = Problem(x, y, torch.ones(2).double(), 100 * x[0])  # w0 keeps all neurons on
    options = {"hidden": 64, "steps": 10, "size": 1e-3, "seed": 0}
    course = train(problem, True, 1.0, torch.ones(1, 1).double(), **options)
    assert course.kernel_rate == 1 and course.errors[0] == 1
    assert course.errors[-1] == pytest.approx((1 - 1e-3) ** 20)
    assert course.bounded and course.times[-1] == pytest.approx(0.01)


def test_an_input_that_is_not_selected_is_not_learnt():
    x = torch.eye(2).double()
    problem = Problem(
        x, torch.ones(2).double(), torch.tensor([1, 0]).double(), torch.zeros(2).double()
    )
    found = compare_grams(x, problem.selection)
    options = {"hidden": 256, "steps": 300, "size": 0.1, "seed": 0}
    course = train(problem, True, found.selected.smallest, found.selected.indicators, **options)
    assert course.kernel_rate == 0 < found.selected.smallest  # definition 1 does not see it
    assert course.errors[-1] > 0.4 and not course.bounded


def test_without_a_selection_the_loss_stays_below_theorem_1s_bound():
    found, _, plain = run_one(SETTINGS[0], Size(draws=1), 0)
    assert plain.rate == found.plain.smallest == pytest.approx(plain.kernel_rate)
    assert plain.bounded and plain.errors[-1] < math.exp(-plain.rate * plain.times[-1])


def test_counts_add_up_and_are_those_of_the_seed():
    for setting in SETTINGS[::5]:
        counts = count(setting, SMALL, 7)
        assert counts == count(setting, SMALL, 7)
        assert counts.draws == 3 == counts.holds + counts.open + counts.fails == len(counts.ratios)


def test_where_the_condition_holds_lambda_is_not_smaller():
    for setting in SETTINGS:
        for seed in range(5):
            found, _, _ = run_one(setting, SMALL, seed)
            if found.holds:
                assert found.selected.smallest >= found.plain.smallest - found.error
