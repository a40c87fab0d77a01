"""Intervals for paired differences, from resamples of seeds and of held-out examples.

Seeds and examples are crossed: each seed answers every example. Each resample therefore draws
seeds and, independently, examples, and takes all pairs of what it drew (Owen, "The pigeonhole
bootstrap", 2007). scipy's bootstrap resamples along one axis and cannot cross two. Two methods are
resampled alike: what the draw of an example or of a seed does to both cancels in the difference.

Of n seeds a resample draws n - 1, whose mean then varies as much as it should; n would vary too
little by the factor (n - 1) / n, which matters for five.

Of simulated comparisons with five seeds, an interval held the true difference in 88 % where the
seeds alone varied, in 96 % where the examples alone did, and in more than 97 % where each seed
fails on examples of its own, as trained models mostly do.
"""

from functools import cached_property

import numpy as np
from numpy import ndarray

from ..paired_metrics import PairedMetric

LEVEL = 0.95  # of the intervals
COUNT = 4000  # resamples
_AT_ONCE = 500  # of which the counts are in memory at a time


class Resamples:
    """The same draws of seeds and of examples for all runs of a comparison."""

    def __init__(self, seeds: int, examples: int, count: int = COUNT) -> None:
        self.seeds, self.examples, self.count = seeds, examples, count
        generator = np.random.default_rng(0)
        drawn = max(1, seeds - 1)
        self._seeds = generator.multinomial(drawn, [1 / seeds] * seeds, size=count) / drawn
        self._start = generator.integers(2**31)

    @cached_property
    def _counts(self) -> list[ndarray]:
        """How often each resample has each example, in blocks of (resamples, examples) int16."""
        generator = np.random.default_rng(self._start)
        blocks = []
        for start in range(0, self.count, _AT_ONCE):
            rows = min(_AT_ONCE, self.count - start)
            drawn = generator.integers(self.examples, size=(rows, self.examples))
            drawn += np.arange(rows)[:, None] * self.examples
            counts = np.bincount(drawn.ravel(), minlength=rows * self.examples)
            blocks.append(counts.reshape(rows, self.examples).astype(np.int16))
        return blocks

    def values(self, metric: PairedMetric, answers: list[ndarray]) -> ndarray:
        """The metric of each seed in each resample of the examples: (resamples, seeds).

        ``answers`` has those of each seed, (examples, columns).
        """
        terms = [metric.terms(rows) for rows in answers]
        columns = []
        for mine in terms:
            sums = [block.astype(np.float64) @ mine for block in self._counts]
            columns.append(metric.value(np.concatenate(sums)))
        return np.stack(columns, axis=1)

    def interval(self, gains: ndarray) -> tuple[float, float]:
        """The interval of the mean over the seeds of gains, (resamples, seeds)."""
        means = (self._seeds * gains).sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
