"""Intervals of paired differences, against cases that can be computed by hand."""

import numpy as np
import pytest

from deltadiff.finetune.compare import resampling
from deltadiff.finetune.compare.resampling import COUNT, LEVEL, Resamples
from deltadiff.finetune.paired_metrics import PAIRED_METRICS

ACCURACY = PAIRED_METRICS["accuracy"]
MEAN = PAIRED_METRICS["nll_per_token"]  # of columns sum and count


def _interval(metric, mine, control):
    resamples = Resamples(len(mine), len(mine[0]))
    answers = {"mine": mine, "control": control}
    answers = {k: [np.array(a, dtype=float) for a in found] for k, found in answers.items()}
    values = resamples.values(metric, answers)
    return resamples.interval(metric.gain(values["mine"], values["control"]))


def _answers(right):
    """Answers to examples of class 1 (columns label, predicted, loss)."""
    return [[1, int(r), 0.0] for r in right]


def test_two_seeds_whose_examples_do_not_vary():
    """A resample draws one of the two seeds, so its mean is that of either with the same odds."""
    mine = [_answers([1] * 8), _answers([0] * 8)]
    assert _interval(ACCURACY, mine, [_answers([0] * 8)] * 2) == (0.0, 1.0)
    assert _interval(ACCURACY, mine, mine) == (0.0, 0.0)  # paired by seed


def test_one_seed_draws_examples_as_a_binomial():
    """30 of 100 examples are won: the resampled difference is Binomial(100, 0.3) / 100."""
    binom = pytest.importorskip("scipy.stats").binom
    low, high = _interval(ACCURACY, [_answers([1] * 30 + [0] * 70)], [_answers([0] * 100)])
    quantiles = [binom.ppf(q, 100, 0.3) / 100 for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
    assert [low, high] == pytest.approx(quantiles, abs=0.011)  # one step, from COUNT resamples


def test_seeds_vary_as_much_as_their_mean():
    """The variance of the mean of n seeds is s^2 / n, which is why n - 1 are drawn."""
    gains = np.random.default_rng(3).normal(size=5)
    mine = [[[g, 1.0]] * 4 for g in gains]
    resamples = Resamples(5, 4, 40_000)
    drawn = resamples._seeds @ gains
    assert drawn.std() == pytest.approx(gains.std(ddof=1) / 5**0.5, rel=0.02)
    assert drawn.mean() == pytest.approx(gains.mean(), abs=0.01)
    low, high = _interval(MEAN, mine, [[[0.0, 1.0]] * 4] * 5)  # a loss: less is better
    assert low < -gains.mean() < high


def test_an_example_that_is_hard_for_both_cancels():
    right = [1] * 50 + [0] * 50
    mine, control = [_answers(right)], [_answers([0, *right[1:]])]
    low, high = _interval(ACCURACY, mine, control)
    assert low == 0.0 and 0.01 <= high <= 0.04  # one example differs, drawn 0 to 4 times
    alone = _interval(ACCURACY, mine, [_answers([0] * 100)])
    assert alone[1] - alone[0] > 0.15


def test_many_examples_are_drawn_in_blocks(monkeypatch):
    mine, control = [_answers([1] * 30 + [0] * 70)], [_answers([0] * 100)]
    monkeypatch.setattr(resampling, "_AT_ONCE", 100 * 7)  # 7 resamples at a time
    low, high = _interval(ACCURACY, mine, control)
    monkeypatch.undo()
    assert [low, high] == pytest.approx(_interval(ACCURACY, mine, control), abs=0.011)


def test_the_same_draws_each_time():
    mine = [_answers([1, 0, 1, 1, 0, 1])] * 3
    control = [_answers([0, 0, 1, 0, 1, 1])] * 3
    assert _interval(ACCURACY, mine, control) == _interval(ACCURACY, mine, control)
    assert Resamples(3, 6).count == COUNT


@pytest.mark.long
@pytest.mark.parametrize(
    ("seed", "example", "both", "least"),
    [(0.05, 0, 0, 0.84), (0, 1, 0, 0.93), (0, 0, 1, 0.97), (0.05, 1, 1, 0.95)],
)
def test_how_often_the_interval_holds_the_truth(seed, example, both, least):
    """Deviations of seeds, examples and of what only one seed does to one example."""
    generator, held = np.random.default_rng(1), 0
    for _ in range(300):
        gains = generator.normal(0, seed, (5, 1)) + generator.normal(0, example, (1, 200))
        gains = gains + generator.normal(0, both, (5, 200))
        resamples = Resamples(5, 200, 500)
        answers = [np.stack([g, np.ones(200)], axis=1) for g in gains]
        low, high = resamples.interval(resamples.values(MEAN, {0: answers})[0])
        held += low <= 0 <= high
    assert held / 300 >= least
