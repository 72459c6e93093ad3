"""What a run has learned: exact match by task on its held-out items, before and after training."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.reader import open_prepared
from trainer.generate import LoadedRun, answers, load_run

EVALUATION = "evaluation.json"
SHOWN = 3  # answers shown side by side


@dataclass(frozen=True)
class TaskScore:
    """Exact match on one task, each as a share of its items: of the base, of always giving the commonest answer,
    and of the adapter."""

    task: str
    items: int
    distinct_answers: int
    base: float
    commonest: float
    adapter: float

    @property
    def gain(self) -> float:
        """Over the better of the base and the commonest answer."""
        return self.adapter - max(self.base, self.commonest)


@dataclass(frozen=True)
class Evaluation:
    """Scores by task, and each item with both answers: {"task", "messages", "answer", "base", "adapter"}."""

    scores: list[TaskScore]
    items: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join([*_table(self.scores), "", *_examples(self.items)])


def evaluate(directory: Path, items_per_task: int, batch_size: int) -> Evaluation:
    """Asks the base and the adapted model for every held-out item, at most `items_per_task` a task.

    Writes evaluation.json into the run. Raises UserError where there is no finished run or its prepared set has gone.
    """
    run = load_run(directory)
    items = _first_of_each_task(open_prepared(run.recipe.data, run.tokenizer).items, items_per_task)
    adapted = _ask(run, items, batch_size)
    with run.model.disable_adapter():
        plain = _ask(run, items, batch_size)
    answered = [{**item, "base": b, "adapter": a} for item, b, a in zip(items, plain, adapted, strict=True)]
    evaluation = Evaluation(score(answered), answered)
    (directory / EVALUATION).write_text(json.dumps(asdict(evaluation), indent=2, ensure_ascii=False) + "\n")
    return evaluation


def score(items: Sequence[dict[str, Any]]) -> list[TaskScore]:
    """Exact match by task, in the order in which tasks appear."""
    scores = []
    for task in dict.fromkeys(item["task"] for item in items):
        mine = [item for item in items if item["task"] == task]
        wanted = Counter(normalised(item["answer"]) for item in mine)
        hits = {who: sum(matches(item[who], item["answer"]) for item in mine) for who in ("base", "adapter")}
        commonest = max(wanted.values())
        shares = [count / len(mine) for count in (hits["base"], commonest, hits["adapter"])]
        scores.append(TaskScore(task, len(mine), len(wanted), *shares))
    return scores


def matches(given: str, wanted: str) -> bool:
    """Exact match, but for outer white space and one full stop at the end."""
    return normalised(given) == normalised(wanted)


def normalised(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _ask(run: LoadedRun, items: Sequence[dict[str, Any]], batch_size: int) -> list[str]:
    """Answers in the order of items; a task at a time, with room for its longest wanted answer and a little more."""
    found = [""] * len(items)
    for task in dict.fromkeys(item["task"] for item in items):
        mine = [i for i, item in enumerate(items) if item["task"] == task]
        wanted = run.tokenizer([items[i]["answer"] for i in mine], add_special_tokens=False)["input_ids"]
        given = answers(run, [items[i] for i in mine], max(map(len, wanted)) + 4, batch_size)
        for i, text in zip(mine, given, strict=True):
            found[i] = text
    return found


def _first_of_each_task(items: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        if seen[item["task"]] < count:
            kept.append(item)
        seen[item["task"]] += 1
    return kept


def _table(scores: Sequence[TaskScore]) -> list[str]:
    lines = [("task", "items", "answers", "commonest", "base", "adapter", "gain")]
    for s in scores:
        shares = (f"{share:.0%}" for share in (s.commonest, s.base, s.adapter))
        lines.append((s.task, str(s.items), str(s.distinct_answers), *shares, f"{100 * s.gain:+.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head = "exact match on held-out items (gain: points over the better of base and commonest answer)"
    return [head, *(_align(line, widths) for line in lines)]


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


def _examples(items: Sequence[dict[str, Any]]) -> list[str]:
    """One item each of the first tasks, where the adapter changed the answer if there is such a one."""
    lines = []
    for task in list(dict.fromkeys(item["task"] for item in items))[:SHOWN]:
        mine = [item for item in items if item["task"] == task]
        item = next((i for i in mine if matches(i["adapter"], i["answer"]) and i["base"] != i["adapter"]), mine[0])
        lines.append(f"[{task}] {item['messages'][-1]['content'].strip()}")
        lines += [f"  {who:8}{' '.join(item[who].split())}" for who in ("answer", "base", "adapter")]
    return lines
