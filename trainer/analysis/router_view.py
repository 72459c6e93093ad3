"""The results of a router analysis as numbers, tables and plots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.plots import save
from data_prep.tables import text_table
from trainer.analysis.document_scores import Scores
from trainer.analysis.router_usage import RouterUsage
from trainer.telemetry import router_plots
from trainer.telemetry.router_numbers import interaction_record

ALL = slice(None)  # chooses all documents
ALONE = (
    "each token's weights omega are replaced by their sum for one expert and 0 for the others; exact: the share of "
    "documents whose every learned token is the likeliest given those before it"
)


@dataclass(frozen=True)
class RouterView:
    """Measurements on held-out documents. scores: with `base` (no adapter), `learned` and each `expert I` alone."""

    method: str
    tasks: list[str]
    names: list[str]
    document_tasks: np.ndarray
    usage: RouterUsage
    interaction: Tensor | None
    scores: dict[str, Scores]

    @property
    def experts(self) -> int:
        return self.usage.omega.shape[2]

    @property
    def present(self) -> list[int]:
        """Ids of the tasks that have documents."""
        return sorted(set(self.document_tasks.tolist()))

    def of_task(self, task: int) -> np.ndarray:
        """Which documents belong to the task: bool [documents]."""
        return self.document_tasks == task

    def best_alone(self, chosen: np.ndarray | slice = ALL) -> str:
        """The expert with the lowest loss alone on the chosen documents."""
        return min(map(only_expert_name, range(self.experts)), key=lambda name: self.scores[name].mean_loss(chosen))


def only_expert_name(expert: int) -> str:
    """The key in `scores` for one expert alone."""
    return f"expert {expert}"


def as_json(view: RouterView) -> dict[str, Any]:
    """All numbers of router.json. What the method does not have is null, with the reason beside it."""
    by_task = {view.tasks[t]: view.of_task(t) for t in view.present}
    numbers = {
        "method": view.method,
        "experts": view.experts,
        "documents": {task: int(chosen.sum()) for task, chosen in by_task.items()},
        **view.usage.as_json(view.names, view.tasks),
        "interaction": None,
        "alone": {
            "definition": ALONE,
            "ways": {
                name: {
                    **_score_json(scores, ALL),
                    "by_task": {task: _score_json(scores, chosen) for task, chosen in by_task.items()},
                }
                for name, scores in view.scores.items()
            },
            "best": view.best_alone(),
            "best_by_task": {task: view.best_alone(chosen) for task, chosen in by_task.items()},
        },
    }
    if view.interaction is None:
        numbers["does_not_apply"] = {"interaction": _no_interaction(view)}
    else:
        numbers["interaction"] = view.interaction.tolist()
        numbers |= interaction_record(view.interaction)
    return numbers


def _score_json(scores: Scores, chosen: np.ndarray | slice) -> dict[str, float]:
    return {"loss": scores.mean_loss(chosen), "exact": scores.exact_share(chosen)}


def _no_interaction(view: RouterView) -> str:
    return f"{view.method} has no interaction matrix: omega is phi"


def tables(view: RouterView, directory: Path) -> str:
    """Router usage by task, and the scores of each expert alone."""
    tokens = int(view.usage.tokens.sum())
    return "\n".join(
        [
            f"routers of {directory}: {view.method}, {view.experts} experts on {len(view.names)} linears; "
            f"{len(view.document_tasks)} held-out documents, {tokens:,} tokens",
            *([_no_interaction(view)] if view.interaction is None else []),
            "weight: mean omega; leads: share of tokens where the expert's omega is the largest; entropy: of phi, as a "
            "share of ln k;",
            "distance: between the mean phi of the task and of all tokens, from 0 to 1, mean over linears",
            text_table(*_usage_table(view)),
            "",
            "held-out loss, nats per learned token, and exact match: without adapter, as learned, and with each expert "
            "alone, given the sum of all weights",
            text_table(["task", *view.scores, "best alone"], list(_alone_rows(view))),
        ]
    )


def _usage_table(view: RouterView) -> tuple[list[str], list[list[str]]]:
    """The head and the rows."""
    numbers, k = view.usage.as_json(view.names, view.tasks), range(view.experts)
    rows = []
    for task in (view.tasks[t] for t in view.present):
        shares = _shares(numbers["omega_by_task"][task], numbers["leading_share_by_task"][task])
        distance = f"{numbers['task_distance_by_task'][task]:.3f}"
        rows.append([task, *shares, f"{numbers['entropy_share_by_task'][task]:.3f}", distance])
    shares = _shares(numbers["omega"], numbers["leading_share"])
    rows.append(["all", *shares, f"{numbers['entropy_share']:.3f}", ""])
    return ["task", *(f"weight {i}" for i in k), *(f"leads {i}" for i in k), "entropy", "distance"], rows


def _shares(omega: Sequence[float], leads: Sequence[float]) -> list[str]:
    return [*(f"{value:.3f}" for value in omega), *(f"{value:.0%}" for value in leads)]


def _alone_rows(view: RouterView) -> Iterator[list[str]]:
    groups: list[tuple[str, np.ndarray | slice]] = [(view.tasks[t], view.of_task(t)) for t in view.present]
    for name, chosen in [*groups, ("all", ALL)]:
        cells = [f"{s.mean_loss(chosen):.3f} {s.exact_share(chosen):4.0%}" for s in view.scores.values()]
        yield [name, *cells, view.best_alone(chosen)]


def save_plots(view: RouterView, folder: Path) -> None:
    """Writes PNG files."""
    present, usage = view.present, view.usage
    tasks = [view.tasks[t] for t in present]
    panels = {
        "mean omega": usage.by_task(usage.omega)[present],
        "share of tokens led": usage.by_task(usage.leads)[present],
    }
    figures = {
        "layers": router_plots.layers_picture(view.names, usage.by_layer(usage.omega), "mean omega"),
        "tasks": router_plots.tasks_picture(tasks, panels),
        "distances": router_plots.distances_picture(tasks, view.names, usage.task_distance()[:, present]),
        "use": router_plots.use_picture(tasks, usage.by_task(usage.leads)[present]),
        "alone": router_plots.alone_picture({name: scores.mean_loss() for name, scores in view.scores.items()}),
    }
    if view.interaction is not None:
        figures["interaction"] = router_plots.interaction_picture(view.names, view.interaction.numpy())
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
