"""`diffora.gram`: cases computed by hand, closed form against draws, and theorem 2's condition."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from deltadiff.diffora import compare_grams, gram
from deltadiff.errors import ArgumentError, ArgumentTypeError


def points(n=5, d=4, seed=0):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True)


def test_two_points_at_a_right_angle_and_at_60_degrees():
    found = gram(torch.eye(2))
    assert found.indicators.tolist() == [[0.5, 0.25], [0.25, 0.5]]
    assert found.matrix.tolist() == [[0.5, 0], [0, 0.5]] and found.smallest == 0.5
    x = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    found = gram(x)
    third = (math.pi - math.pi / 3) / (2 * math.pi)
    torch.testing.assert_close(
        found.matrix, torch.tensor([[0.5, third / 2], [third / 2, 0.5]]).double()
    )
    assert found.smallest == pytest.approx(0.5 - third / 2) and found.standard_error == 0


def test_a_selection_that_turns_points_into_the_same_direction():
    x = torch.tensor([[0.6, 0.8], [0.6, -0.8]])
    found = gram(x, torch.tensor([1, 0]))
    torch.testing.assert_close(found.indicators, torch.full((2, 2), 0.5).double())
    assert gram(x, torch.tensor([[1, 0], [0, 0]])).matrix.equal(found.matrix)


def test_a_point_that_the_selection_removes_is_always_on():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    found = gram(x, torch.tensor([1, 0]))
    assert found.indicators.tolist() == [[0.5, 0.5, 0.5], [0.5, 1, 1], [0.5, 1, 1]]


def test_draws_agree_with_the_distribution_function():
    x, w0 = points(), torch.tensor([0.3, -0.2, 0.5, 0.1]).double()
    chosen = torch.tensor([1, 1, 0, 1])
    found = gram(x, chosen, w0, samples=200_000)
    z, offset = (x * chosen), x @ w0
    for i in range(len(x)):
        for j in range(len(x)):
            covariance = (z[[i, j]] @ z[[i, j]].T).numpy()
            expected = multivariate_normal.cdf(
                offset[[i, j]].numpy(), cov=covariance, allow_singular=True
            )
            assert abs(found.indicators[i, j] - expected) <= 5 * found.standard_error
    assert 0 < found.standard_error <= 0.5 / math.sqrt(200_000)


def test_draws_are_those_of_the_seed():
    x, w0 = points(), torch.ones(4)
    one, again, other = (gram(x, None, w0, samples=500, seed=s) for s in (1, 1, 2))
    assert one.indicators.equal(again.indicators) and not one.indicators.equal(other.indicators)


def test_the_condition_at_0_holds_only_where_angles_stay():
    x = points()
    assert compare_grams(x, torch.ones(4)).holds is True
    assert compare_grams(
        torch.cat([x, torch.zeros(5, 2).double()], 1), torch.tensor([1, 1, 1, 1, 0, 0])
    ).holds
    found = compare_grams(x, torch.tensor([1, 1, 1, 0]))
    assert found.holds is False and found.error == 0
    assert found.difference < 0


def test_the_condition_fails_where_a_point_is_on_the_other_side_of_w0():
    x = points(3)
    w0 = -x[0] * torch.tensor([1, 1, 1, 0])
    found = compare_grams(x, torch.tensor([1, 1, 1, 0]), w0)
    assert found.holds is False and found.difference < -found.error < 0


def test_what_the_error_leaves_open_is_not_called_known():
    x, chosen = points(2).abs(), torch.tensor([1, 1, 1, 0])
    few, many = (compare_grams(x, chosen, x[0] + x[1], samples=s) for s in (30, 100_000))
    assert 0 < abs(few.difference) <= few.error and few.holds is None
    assert 0 < many.error < few.error / 10


@pytest.mark.parametrize(
    "change, error",
    [
        ({"x": [[1.0]]}, ArgumentTypeError),
        ({"x": torch.ones(3)}, ArgumentError),
        ({"x": torch.full((2, 4), math.nan)}, ArgumentError),
        ({"x": torch.ones(2, 4, dtype=torch.int64)}, ArgumentTypeError),
        ({"selection": torch.ones(3)}, ArgumentError),
        ({"selection": torch.full((4,), 0.5)}, ArgumentError),
        ({"selection": [1, 1, 0, 1]}, ArgumentError),
        ({"w0": torch.ones(3)}, ArgumentError),
        ({"w0": torch.full((4,), math.inf)}, ArgumentError),
        ({"samples": 1}, ArgumentError),
    ],
)  # fmt: skip
def test_wrong_arguments(change, error):
    given = {"x": points(), "selection": torch.ones(4), **change}
    (name,) = change
    with pytest.raises(error, match=name):
        compare_grams(**given)
