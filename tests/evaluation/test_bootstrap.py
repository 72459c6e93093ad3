"""The paired bootstrap against closed forms for many items."""

import numpy as np
import pytest

from trainer.evaluation.bootstrap import Resampler, confidence_interval

ITEMS = 4000
NORMAL = 1.96  # half the width of a 95 % interval, in standard errors


def test_the_interval_is_the_normal_one_where_items_are_many():
    differences = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], size=ITEMS, p=[0.1, 0.6, 0.3])
    found = confidence_interval(Resampler(ITEMS, 0).means(differences, np.ones(ITEMS)))
    error = differences.std() / ITEMS**0.5
    assert found.mean == pytest.approx(differences.mean())
    assert (found.mean - found.low) / error == pytest.approx(NORMAL, abs=0.15)
    assert (found.high - found.mean) / error == pytest.approx(NORMAL, abs=0.15)


def test_a_ratio_of_sums_has_the_interval_of_the_delta_method():
    random = np.random.default_rng(2)
    tokens = random.integers(1, 20, size=ITEMS).astype(float)
    nats = tokens * random.normal(-0.2, 1, size=ITEMS)
    found = confidence_interval(Resampler(ITEMS, 0).means(nats, tokens))
    ratio = nats.sum() / tokens.sum()
    error = (nats - ratio * tokens).std() / tokens.mean() / ITEMS**0.5
    assert found.mean == pytest.approx(ratio)
    assert (found.high - found.low) / error == pytest.approx(2 * NORMAL, abs=0.2)


def test_the_mean_over_tasks_is_surer_than_one_task_since_tasks_are_drawn_apart():
    differences = np.random.default_rng(3).normal(size=ITEMS)
    means = [Resampler(ITEMS, task).means(differences, np.ones(ITEMS)) for task in range(4)]
    one, four = confidence_interval(means[0]), confidence_interval(np.mean(means, axis=0))
    assert (one.high - one.low) / (four.high - four.low) == pytest.approx(2, rel=0.08)


def test_the_same_items_have_the_same_interval_and_equal_models_none():
    differences = np.arange(5.0)
    first, second = (confidence_interval(Resampler(5, 2).means(differences, np.ones(5))) for _ in range(2))
    assert first == second
    nothing = confidence_interval(Resampler(5, 2).means(np.zeros(5), np.ones(5)))
    assert (nothing.mean, nothing.low, nothing.high) == (0, 0, 0)
