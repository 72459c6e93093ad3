"""Scores by task and over tasks, and the differences between the run and each baseline with their intervals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.bootstrap import Difference, Resampler, interval
from trainer.evaluation.scoring import CHOICES, TEXT_METRICS, exact_match, metrics_of, normalised

SCORE, LOSS = "score", "loss"
SUBJECT = "adapter"  # the name of what is evaluated; every other model is a baseline
METRICS = (*TEXT_METRICS, CHOICES, f"{CHOICES}_by_length")


@dataclass(frozen=True)
class TaskSummary:
    """One task, or the mean over all.

    commonest: what always giving the commonest wanted answer would score. models: by name, `score` (the task's own
    metric), `loss` (nats a token of the wanted answers) and every metric. gain: of the subject's score over the best of
    the baselines and the commonest answer. differences: by baseline, the subject's `score` and `loss` less its.
    """

    task: str
    items: int
    metric: str
    distinct_answers: int
    commonest: float
    models: dict[str, dict[str, float]]
    gain: float
    differences: dict[str, dict[str, Difference]]


def summarise(items: Sequence[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> list[TaskSummary]:
    """By task, in the order in which tasks appear, and the mean over tasks as the last.

    found: by model's name what `asking.ask` gives, in the order of items; SUBJECT is one of them.
    """
    tasks, resampled, metrics = [], [], metrics_of(items)
    for index, task in enumerate(dict.fromkeys(item["task"] for item in items)):
        mine = [i for i, item in enumerate(items) if item["task"] == task]
        scores = {name: [given[i] for i in mine] for name, given in found.items()}
        metric = metrics[task]
        means = _resampled_differences(scores, metric, Resampler(len(mine), index))
        tasks.append(_of_task(task, metric, [items[i] for i in mine], scores, means))
        resampled.append(means)
    return [*tasks, _mean(tasks, resampled)]


def _of_task(
    task: str,
    metric: str,
    items: Sequence[dict[str, Any]],
    scores: dict[str, list[dict[str, Any]]],
    means: dict[str, dict[str, np.ndarray]],
) -> TaskSummary:
    models = {name: _means(given, metric) for name, given in scores.items()}
    wanted = Counter(normalised(item["answer"]) for item in items)
    score = TEXT_METRICS.get(metric, exact_match)
    commonest = float(np.mean([score(wanted.most_common(1)[0][0], item["answer"]) for item in items]))
    best = max([commonest, *(found[SCORE] for name, found in models.items() if name != SUBJECT)])
    gain = models[SUBJECT][SCORE] - best
    return TaskSummary(task, len(items), metric, len(wanted), commonest, models, gain, _intervals(means))


def _means(given: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    tokens = sum(one["tokens"] for one in given)
    means = {SCORE: _mean_of(given, metric), LOSS: sum(one[LOSS] for one in given) / tokens}
    return means | {name: _mean_of(given, name) for name in METRICS if all(name in one for one in given)}


def _mean_of(given: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([one[name] for one in given]))


def _resampled_differences(
    scores: dict[str, list[dict[str, Any]]], metric: str, resampler: Resampler
) -> dict[str, dict[str, np.ndarray]]:
    """By baseline, for score and loss, the mean difference over all items and over each draw of them."""
    found = {}
    tokens = np.array([one["tokens"] for one in scores[SUBJECT]])
    for name in scores.keys() - {SUBJECT}:
        differences = {
            key: np.array([a[key] - b[key] for a, b in zip(scores[SUBJECT], scores[name], strict=True)])
            for key in (metric, LOSS)
        }
        found[name] = {
            SCORE: resampler.means(differences[metric], np.ones(len(tokens))),
            LOSS: resampler.means(differences[LOSS], tokens),
        }
    return found


def _intervals(means: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Difference]]:
    return {name: {key: interval(values) for key, values in by_key.items()} for name, by_key in means.items()}


def _mean(tasks: Sequence[TaskSummary], resampled: Sequence[dict[str, dict[str, np.ndarray]]]) -> TaskSummary:
    """Every task counts alike, also in each of its draws."""
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
