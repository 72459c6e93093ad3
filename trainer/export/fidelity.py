"""Measures how far an exported model's predictions are from the run's, on held-out rows and items, by task.

Both models run on the same rows. A token's KL divergence is KL(run || exported), in nats over the whole vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.tables import text_table
from trainer.evaluation.loaded_models import CausalLM, LoadedRun
from trainer.evaluation.runner import RunnerOptions, build_questions, run_items
from trainer.evaluation.scoring import metrics_of
from trainer.objective.batches import Batch, move, of_labelled
from trainer.objective.chunked_logits import ChunkedLogits
from trainer.objective.packed_forward import packed_forward

CHUNK = 128  # tokens whose logits, and distributions in fp64, are held at a time
BATCH = 16  # items per batch
ALL = "all"

Score = Callable[[CausalLM], dict[str, float]]  # a model -> {task: score}, such as exact match


@dataclass(frozen=True)
class TaskFidelity:
    """One task's labelled held-out tokens: nats per token, None without tokens. Scores are None if not measured."""

    task: str
    tokens: int
    kl: float | None
    loss_before: float | None
    loss_after: float | None
    score_before: float | None = None
    score_after: float | None = None


def measure(
    before: CausalLM, after: CausalLM, batches: Iterable[Batch], tasks: Sequence[str], score: Score | None = None
) -> list[TaskFidelity]:
    """Compares two models on labelled tokens: one entry per task that has tokens or scores, then one for all."""
    sums = torch.zeros(len(tasks), 4, dtype=torch.float64)
    for batch in batches:
        sums += _sums(before, after, batch, len(tasks))
    scores = [score(before), score(after)] if score is not None else [{}, {}]
    by_task = [
        _task_fidelity(task, line, [found.get(task) for found in scores])
        for task, line in zip(tasks, sums, strict=True)
    ]
    mean_scores = [sum(found.values()) / len(found) if found else None for found in scores]
    lines = [*by_task, _task_fidelity(ALL, sums.sum(0), mean_scores)]
    return [line for line in lines if line.tokens or line.score_before is not None]


def _task_fidelity(task: str, sums: Tensor, scores: Sequence[float | None]) -> TaskFidelity:
    """sums: one task's row of `_sums`."""
    means = (sums[1:] / sums[0]).tolist() if sums[0] else [None] * 3
    return TaskFidelity(task, int(sums[0]), *means, *scores)


@torch.no_grad()
def _sums(before: CausalLM, after: CausalLM, batch: Batch, num_tasks: int) -> Tensor:
    """fp64 [tasks, 4] over a batch's labelled tokens: their number, KL, loss before and loss after.

    In fp64: the rounding noise of fp32, about 1e-8 nats per token, can exceed the KL of a faithful export.
    """
    targets = of_labelled(batch["labels"], batch)
    logits = [_logits(model, move(batch, next(model.parameters()).device)) for model in (before, after)]
    columns = []
    for one, other, labels in zip(*logits, targets.split(CHUNK), strict=True):
        p, q = (F.log_softmax(part.cpu().double(), -1) for part in (one, other))
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        losses = (F.nll_loss(part, labels, reduction="none") for part in (p, q))
        columns.append(torch.stack([torch.ones_like(kl), kl, *losses], 1))
    by_token = torch.cat(columns)
    return torch.zeros(num_tasks, 4, dtype=torch.float64).index_add(0, of_labelled(batch["task_ids"], batch), by_token)


def _logits(model: CausalLM, batch: Batch) -> Iterator[Tensor]:
    """[tokens, vocabulary] at CHUNK labelled tokens after the other."""
    return ChunkedLogits(model).split(packed_forward(model, batch), batch["predicting"], CHUNK)


def item_scorer(run: LoadedRun, items: Sequence[dict[str, Any]]) -> Score | None:
    """Scores a model on the items as `teamlora evaluate` does: its mean score by task. None without items."""
    if not items:
        return None
    questions, metrics = build_questions(items, run.tokenizer, run.recipe.data), metrics_of(items)
    options = RunnerOptions(run.tokenizer, BATCH, sharded=False)

    def score(model: CausalLM) -> dict[str, float]:
        by_task: dict[str, list[float]] = {}
        for item, result in zip(items, run_items(model, questions, options), strict=True):
            by_task.setdefault(item["task"], []).append(result[metrics[item["task"]]])
        return {task: sum(scores) / len(scores) for task, scores in by_task.items()}

    return score


def fidelity_table(lines: Sequence[TaskFidelity]) -> str:
    """Losses and KL by task, and scores if there are any."""
    scored = any(line.score_before is not None for line in lines)
    head = ["task", "tokens", "KL per token", "loss before", "after", *(["score before", "after"] if scored else [])]
    return text_table(head, [_cells(line, scored) for line in lines])


def _cells(line: TaskFidelity, scored: bool) -> list[str]:
    cells = [line.task, str(line.tokens), _cell(line.kl, ".2e")]
    cells += [_cell(loss, ".4f") for loss in (line.loss_before, line.loss_after)]
    if scored:
        cells += [_cell(score, ".1%") for score in (line.score_before, line.score_after)]
    return cells


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
