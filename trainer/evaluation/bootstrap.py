"""Intervals for the difference of two models that were asked the same items: the paired bootstrap."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


@dataclass(frozen=True)
class Difference:
    """A mean difference, and the ends of the interval that holds LEVEL of its resampled values."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Resampler:
    """Draws the items of one task RESAMPLES times with replacement, always the same draws for a task's index."""

    def __init__(self, items: int, task: int) -> None:
        self._draws = np.random.default_rng([SEED, task]).integers(items, size=(RESAMPLES, items), dtype=np.int32)

    def means(self, differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[items] -> [RESAMPLES + 1]: the weighted mean of all items, then of each draw.

        differences: an item's difference times its weight, such as the nats by which two models differ on its tokens.
        """
        resampled = differences[self._draws].sum(1) / weights[self._draws].sum(1)
        return np.concatenate([[differences.sum() / weights.sum()], resampled])


def interval(means: np.ndarray) -> Difference:
    """From what `Resampler.means` gives for one task, or from the mean of that over tasks."""
    low, high = np.quantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(means[0]), float(low), float(high))
