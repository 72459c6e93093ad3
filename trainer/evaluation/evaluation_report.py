"""What an evaluation leaves: a table, evaluation.json, and TensorBoard's scalars beside those of training."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.publish import write_atomically
from trainer.evaluation.bootstrap import Difference
from trainer.evaluation.scoring import exact_match
from trainer.evaluation.summary import LOSS, SCORE, SUBJECT, TaskSummary
from trainer.telemetry.metrics import METRICS, TENSORBOARD

EVALUATION = "evaluation.json"
SHOWN = 3  # answers shown side by side


@dataclass(frozen=True)
class Evaluation:
    """Baselines by name with their folders (None: the bare base), scores by task, and the mean over tasks.

    items: each as it was asked, with `models`: by name what it gave and its scores (see `asking.ask`).
    """

    baselines: dict[str, str | None]
    tasks: list[TaskSummary]
    mean: TaskSummary
    items: list[dict[str, Any]]

    def __str__(self) -> str:
        rows = self.tasks if len(self.tasks) == 1 else [*self.tasks, self.mean]
        models = [*self.baselines, SUBJECT]
        return "\n".join(
            [*_scores(rows, models), "", *_losses(rows, models), "", *_examples(self.items, ["answer", *models])]
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def write(evaluation: Evaluation, directory: Path) -> None:
    """evaluation.json. Raises OSError where the disk refuses; an older one is then left as it is."""
    write_atomically(directory / EVALUATION, evaluation.as_json() + "\n")


def write_tensorboard(evaluation: Evaluation, directory: Path) -> None:
    """evaluate/TASK/METRIC and evaluate/TASK/loss of the run's own model, at the run's last step."""
    from torch.utils.tensorboard import SummaryWriter

    with (directory / METRICS).open("rb") as file:
        step = json.loads(file.readlines()[-1])["step"]
    with SummaryWriter(str(directory / TENSORBOARD)) as board:
        for task in evaluation.tasks:
            board.add_scalar(f"evaluate/{task.task}/{task.metric}", task.models[SUBJECT][SCORE], step)
            board.add_scalar(f"evaluate/{task.task}/{LOSS}", task.models[SUBJECT][LOSS], step)


def _scores(tasks: Sequence[TaskSummary], models: Sequence[str]) -> list[str]:
    baselines = [name for name in models if name != SUBJECT]
    lines = [["task", "items", "answers", "metric", "commonest", *models, "gain", *map(_less, baselines)]]
    for task in tasks:
        shares = [f"{share:.0%}" for share in (task.commonest, *(task.models[name][SCORE] for name in models))]
        differences = [_told(task.differences[name][SCORE], 100, ".0f") for name in baselines]
        counts = [str(task.items), str(task.distinct_answers), task.metric]
        lines.append([task.task, *counts, *shares, f"{100 * task.gain:+.0f}", *differences])
    head = "scores on held-out items (gain: points over the best of all baselines and the commonest answer)"
    return [head, *_aligned(lines)]


def _losses(tasks: Sequence[TaskSummary], models: Sequence[str]) -> list[str]:
    baselines = [name for name in models if name != SUBJECT]
    lines = [["task", *models, *map(_less, baselines)]]
    for task in tasks:
        differences = [_told(task.differences[name][LOSS], 1, ".3f") for name in baselines]
        lines.append([task.task, *(f"{task.models[name][LOSS]:.3f}" for name in models), *differences])
    return ["loss, nats a token of the wanted answers", *_aligned(lines)]


def _less(name: str) -> str:
    return f"{SUBJECT} - {name} [95 %]"


def _told(difference: Difference, unit: float, form: str) -> str:
    mean, low, high = (f"{unit * value:+{form}}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterable[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *numbers])


def _examples(items: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """One item each of the first tasks, where the adapter alone has the wanted answer if there is such a one."""
    lines = []
    width = max(map(len, names)) + 2
    for task in list(dict.fromkeys(item["task"] for item in items))[:SHOWN]:
        mine = [item for item in items if item["task"] == task]
        item = next(filter(_is_learnt, mine), mine[0])
        given = {"answer": item["answer"], **{name: scores["given"] for name, scores in item["models"].items()}}
        question = next((turn["content"] for turn in reversed(item["messages"]) if turn.get("content")), "")
        lines.append(f"[{task}] {question.strip()}")
        lines += [f"  {name:{width}}{' '.join(given[name].split())}" for name in names]
    return lines


def _is_learnt(item: dict[str, Any]) -> bool:
    right = {name: exact_match(scores["given"], item["answer"]) for name, scores in item["models"].items()}
    return bool(right.pop(SUBJECT)) and not any(right.values())
