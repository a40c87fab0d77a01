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

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy import ndarray

from ..paired_metrics import PairedMetric

LEVEL = 0.95  # of the intervals
COUNT = 4000  # resamples
_AT_ONCE = 2**22  # counts of examples that are in memory at a time
Name = TypeVar("Name", bound=Hashable)


class Resamples:
    """The same draws of seeds and of examples for all that is compared."""

    def __init__(self, seeds: int, examples: int, count: int = COUNT) -> None:
        self.examples, self.count = examples, count
        self._generator = np.random.default_rng(0)
        drawn = max(1, seeds - 1)
        self._seeds = self._generator.multinomial(drawn, [1 / seeds] * seeds, size=count) / drawn

    def _counts(self) -> Iterator[ndarray]:
        """How often each resample has each example, in blocks of (resamples, examples)."""
        rows = max(1, _AT_ONCE // self.examples)
        for start in range(0, self.count, rows):
            rows = min(rows, self.count - start)
            drawn = self._generator.integers(self.examples, size=(rows, self.examples))
            drawn += np.arange(rows)[:, None] * self.examples
            counts = np.bincount(drawn.ravel(), minlength=rows * self.examples)
            yield counts.reshape(rows, self.examples).astype(np.float64)

    def values(
        self, metric: PairedMetric, answers: Mapping[Name, Sequence[ndarray]]
    ) -> dict[Name, ndarray]:
        """The metric of each seed in each resample of the examples: (resamples, seeds) by name.

        ``answers`` has those of each seed, (examples, columns), by the same names.
        """
        terms = {name: [metric.terms(rows) for rows in found] for name, found in answers.items()}
        blocks: dict[Name, list[ndarray]] = {name: [] for name in answers}
        for counts in self._counts():
            for name, found in terms.items():
                seeds = [metric.value(counts @ mine) for mine in found]
                blocks[name].append(np.stack(seeds, axis=1))
        return {name: np.concatenate(found) for name, found in blocks.items()}

    def interval(self, gains: ndarray) -> tuple[float, float]:
        """The interval of the mean over the seeds of gains, (resamples, seeds)."""
        means = (self._seeds * gains).sum(1)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)
