"""Task scores of a run's model and of what was exported of it, as `teamlora evaluate` takes them."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from trainer.evaluation.loaded_models import LoadedRun
from trainer.evaluation.runner import RunnerOptions, build_questions, run_items
from trainer.evaluation.scoring import metrics_of
from trainer.export.fidelity import Score

BATCH = 16


def scorer(run: LoadedRun, items: Sequence[dict[str, Any]]) -> Score | None:
    """Puts the items to a model and gives its mean score by task, by each task's metric.

    None where there are no items.
    """
    if not items:
        return None
    asked, metrics = build_questions(items, run.tokenizer, run.recipe.data), metrics_of(items)

    def score(model: nn.Module) -> dict[str, float]:
        by_task: dict[str, list[float]] = {}
        for item, found in zip(
            items, run_items(model, asked, RunnerOptions(run.tokenizer, BATCH, sharded=False)), strict=True
        ):
            by_task.setdefault(item["task"], []).append(found[metrics[item["task"]]])
        return {task: sum(scores) / len(scores) for task, scores in by_task.items()}

    return score
