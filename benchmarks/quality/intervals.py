"""Means over tasks, seeds and items, and their intervals: the bootstrap over seeds and, within each task, items."""

from collections.abc import Mapping, Sequence

import numpy as np

from trainer.evaluation.bootstrap import RESAMPLES, SEED, Difference, confidence_interval

Scores = Mapping[str, np.ndarray]  # by task: [seeds, items]


class Draws:
    """The same draws of seeds and items for everything that is compared, so that differences are paired."""

    def __init__(self, items: Mapping[str, int], seeds: int) -> None:
        generator = np.random.default_rng(SEED)
        self._seeds = generator.integers(seeds, size=(RESAMPLES, seeds))
        self._items = {task: generator.integers(count, size=(RESAMPLES, count)) for task, count in items.items()}

    def mean(self, scores: Scores) -> Difference:
        """Every task counts alike."""
        tasks = [self._of_task(scores[task], self._items[task]) for task in scores]
        return confidence_interval(np.mean(tasks, axis=0))

    def difference(self, ours: Scores, theirs: Scores) -> Difference:
        return self.mean({task: ours[task] - theirs[task] for task in ours})

    def _of_task(self, scores: np.ndarray, items: np.ndarray) -> np.ndarray:
        """[seeds, items] -> [RESAMPLES + 1]: the mean of all, then of each draw."""
        drawn = scores[self._seeds[:, :, None], items[:, None, :]].mean((1, 2))
        return np.concatenate([[scores.mean()], drawn])


def stacked(scores: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, np.ndarray]:
    """A seed's scores by task, of each seed -> by task [seeds, items]."""
    return {task: np.array([one[task] for one in scores]) for task in scores[0]}
