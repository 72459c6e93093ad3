"""The results of an evaluation: a table, evaluation.json, and TensorBoard scalars beside those of training."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.publish import write_atomically
from data_prep.tables import text_table
from data_prep.terminal_text import without_control_codes
from trainer.evaluation.bootstrap import Difference
from trainer.evaluation.scoring import exact_match
from trainer.evaluation.summary import LOSS, SCORE, SUBJECT, TaskSummary
from trainer.telemetry.metrics import METRICS, TENSORBOARD

EVALUATION = "evaluation.json"
EXAMPLES = 3  # items whose answers are printed side by side


@dataclass(frozen=True)
class Evaluation:
    """Scores by task and their mean over tasks. baselines: adapter folders by name (None: the bare base).

    items: the held-out items; `models` of each holds every model's answer and scores by name (`runner.run_items`).
    """

    baselines: dict[str, str | None]
    tasks: list[TaskSummary]
    mean: TaskSummary
    items: list[dict[str, Any]]

    def __str__(self) -> str:
        rows = self.tasks if len(self.tasks) == 1 else [*self.tasks, self.mean]
        models = [*self.baselines, SUBJECT]
        examples = _examples(self.items, ["answer", *models])
        return "\n".join([*_scores(rows, models), "", *_losses(rows, models), "", *examples])

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


def write_json(evaluation: Evaluation, directory: Path) -> None:
    """Writes evaluation.json. Raises OSError if it cannot be written; an older file is then kept."""
    write_atomically(directory / EVALUATION, evaluation.as_json() + "\n")


def write_tensorboard(evaluation: Evaluation, directory: Path) -> None:
    """evaluate/TASK/METRIC and evaluate/TASK/loss of the evaluated model, at the run's last step."""
    from torch.utils.tensorboard import SummaryWriter

    with (directory / METRICS).open("rb") as file:
        step = json.loads(file.readlines()[-1])["step"]
    with SummaryWriter(str(directory / TENSORBOARD)) as writer:
        for task in evaluation.tasks:
            writer.add_scalar(f"evaluate/{task.task}/{task.metric}", task.models[SUBJECT][SCORE], step)
            writer.add_scalar(f"evaluate/{task.task}/{LOSS}", task.models[SUBJECT][LOSS], step)


def _scores(tasks: Sequence[TaskSummary], models: Sequence[str]) -> list[str]:
    baselines = [name for name in models if name != SUBJECT]
    head = ["task", "items", "answers", "metric", "majority", *models, "gain", *map(_difference_head, baselines)]
    rows = []
    for task in tasks:
        shares = [f"{share:.0%}" for share in (task.commonest, *(task.models[name][SCORE] for name in models))]
        differences = [_format(task.differences[name][SCORE], 100, ".0f") for name in baselines]
        counts = [str(task.items), str(task.distinct_answers), task.metric]
        rows.append([task.task, *counts, *shares, f"{100 * task.gain:+.0f}", *differences])
    return [
        "scores on held-out items (majority: always giving the most common answer; gain: points over the best of "
        "majority and all baselines)",
        text_table(head, rows),
    ]


def _losses(tasks: Sequence[TaskSummary], models: Sequence[str]) -> list[str]:
    baselines = [name for name in models if name != SUBJECT]
    head = ["task", *models, *map(_difference_head, baselines)]
    rows = []
    for task in tasks:
        differences = [_format(task.differences[name][LOSS], 1, ".3f") for name in baselines]
        rows.append([task.task, *(f"{task.models[name][LOSS]:.3f}" for name in models), *differences])
    return ["loss on the reference answers, nats per token", text_table(head, rows)]


def _difference_head(baseline: str) -> str:
    return f"{SUBJECT} - {baseline} [95 %]"


def _format(difference: Difference, unit: float, form: str) -> str:
    mean, low, high = (f"{unit * value:+{form}}" for value in (difference.mean, difference.low, difference.high))
    return f"{mean} [{low}, {high}]"


def _examples(items: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """One item of each of the first tasks: one that only the adapter answers correctly, if there is one."""
    lines = []
    width = max(map(len, names)) + 2
    for task in list(dict.fromkeys(item["task"] for item in items))[:EXAMPLES]:
        of_task = [item for item in items if item["task"] == task]
        item = next(filter(_only_adapter_is_right, of_task), of_task[0])
        given = {"answer": item["answer"], **{name: scores["given"] for name, scores in item["models"].items()}}
        question = next((turn["content"] for turn in reversed(item["messages"]) if turn.get("content")), "")
        lines.append(f"[{task}] {without_control_codes(question.strip())}")
        lines += [f"  {name:{width}}{without_control_codes(' '.join(given[name].split()))}" for name in names]
    return lines


def _only_adapter_is_right(item: dict[str, Any]) -> bool:
    right = {name: exact_match(scores["given"], item["answer"]) for name, scores in item["models"].items()}
    return bool(right.pop(SUBJECT)) and not any(right.values())
