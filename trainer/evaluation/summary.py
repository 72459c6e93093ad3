"""Scores by task and over tasks, and the differences from each baseline with confidence intervals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.bootstrap import Difference, Resampler, confidence_interval
from trainer.evaluation.scoring import CHOICES, TEXT_METRICS, exact_match, metrics_of, normalize

SCORE, LOSS = "score", "loss"
SUBJECT = "adapter"  # name of the evaluated model; all others are baselines
METRICS = (*TEXT_METRICS, CHOICES, f"{CHOICES}_by_length")


@dataclass(frozen=True)
class TaskSummary:
    """One task, or the mean over all.

    commonest: the score of always giving the most common reference answer. models: by name, `score` (the task's own
    metric), `loss` (nats per token of the reference answers) and every metric. gain: the subject's score minus the best
    of the baselines and `commonest`. differences: by baseline, the subject's `score` and `loss` minus the baseline's.
    """

    task: str
    items: int
    metric: str
    distinct_answers: int
    commonest: float
    models: dict[str, dict[str, float]]
    gain: float
    differences: dict[str, dict[str, Difference]]


def summarize(items: Sequence[dict[str, Any]], results: dict[str, list[dict[str, Any]]]) -> list[TaskSummary]:
    """One summary per task, in order of appearance, then the mean over tasks.

    results: each model's `runner.run_items` by name, in the order of items; SUBJECT is one of them.
    """
    tasks, resampled, metrics = [], [], metrics_of(items)
    for index, task in enumerate(dict.fromkeys(item["task"] for item in items)):
        indices = [i for i, item in enumerate(items) if item["task"] == task]
        scores = {name: [given[i] for i in indices] for name, given in results.items()}
        metric = metrics[task]
        means = _resampled_differences(scores, metric, Resampler(len(indices), index))
        tasks.append(_summarize_task(task, metric, [items[i] for i in indices], scores, means))
        resampled.append(means)
    return [*tasks, _mean(tasks, resampled)]


def _summarize_task(
    task: str,
    metric: str,
    items: Sequence[dict[str, Any]],
    scores: dict[str, list[dict[str, Any]]],
    means: dict[str, dict[str, np.ndarray]],
) -> TaskSummary:
    models = {name: _means(given, metric) for name, given in scores.items()}
    references = Counter(normalize(item["answer"]) for item in items)
    score = TEXT_METRICS.get(metric, exact_match)
    commonest = float(np.mean([score(references.most_common(1)[0][0], item["answer"]) for item in items]))
    best = max([commonest, *(by_key[SCORE] for name, by_key in models.items() if name != SUBJECT)])
    gain = models[SUBJECT][SCORE] - best
    return TaskSummary(task, len(items), metric, len(references), commonest, models, gain, _intervals(means))


def _means(given: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    tokens = sum(one["tokens"] for one in given)
    means = {SCORE: _mean_of(given, metric), LOSS: sum(one[LOSS] for one in given) / tokens}
    return means | {name: _mean_of(given, name) for name in METRICS if all(name in one for one in given)}


def _mean_of(given: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([one[name] for one in given]))


def _resampled_differences(
    scores: dict[str, list[dict[str, Any]]], metric: str, resampler: Resampler
) -> dict[str, dict[str, np.ndarray]]:
    """By baseline, for score and loss: `Resampler.means` of the differences."""
    by_baseline = {}
    tokens = np.array([one["tokens"] for one in scores[SUBJECT]])
    for name in scores.keys() - {SUBJECT}:
        differences = {
            key: np.array([a[key] - b[key] for a, b in zip(scores[SUBJECT], scores[name], strict=True)])
            for key in (metric, LOSS)
        }
        by_baseline[name] = {
            SCORE: resampler.means(differences[metric], np.ones(len(tokens))),
            LOSS: resampler.means(differences[LOSS], tokens),
        }
    return by_baseline


def _intervals(means: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Difference]]:
    return {
        name: {key: confidence_interval(values) for key, values in by_key.items()} for name, by_key in means.items()
    }


def _mean(tasks: Sequence[TaskSummary], resampled: Sequence[dict[str, dict[str, np.ndarray]]]) -> TaskSummary:
    """Every task has the same weight, also in each draw."""
    models = {
        name: {key: float(np.mean([task.models[name][key] for task in tasks])) for key in (SCORE, LOSS)}
        for name in tasks[0].models
    }
    means = {
        name: {key: np.mean([by_name[name][key] for by_name in resampled], axis=0) for key in (SCORE, LOSS)}
        for name in resampled[0]
    }
    commonest, gain = (float(np.mean([getattr(task, key) for task in tasks])) for key in ("commonest", "gain"))
    items, distinct = (sum(getattr(task, key) for task in tasks) for key in ("items", "distinct_answers"))
    return TaskSummary("mean", items, "", distinct, commonest, models, gain, _intervals(means))
