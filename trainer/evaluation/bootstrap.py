"""Confidence intervals for the difference between two models on the same items: the paired bootstrap."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0


@dataclass(frozen=True)
class Difference:
    """A mean difference and the ends of the interval that holds CONFIDENCE of its resampled values."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Resampler:
    """Draws the items of one task RESAMPLES times with replacement; a task's index always gives the same draws."""

    def __init__(self, items: int, task: int) -> None:
        self._draws = np.random.default_rng([SEED, task]).integers(items, size=(RESAMPLES, items), dtype=np.int32)

    def means(self, differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[items] -> [RESAMPLES + 1]: the weighted mean over all items, then over each draw.

        differences: each item's difference times its weight, such as the nats by which two models differ on its tokens.
        """
        resampled = differences[self._draws].sum(1) / weights[self._draws].sum(1)
        return np.concatenate([[differences.sum() / weights.sum()], resampled])


def confidence_interval(means: np.ndarray) -> Difference:
    """means: one task's `Resampler.means`, or their mean over tasks."""
    low, high = np.quantile(means[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(means[0]), float(low), float(high))
