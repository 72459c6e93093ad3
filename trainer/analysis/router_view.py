"""What was seen of a finished run's routers: as numbers, as tables and as router_plots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data_prep.plots import save
from trainer.analysis.document_scores import Scores
from trainer.analysis.router_usage import RouterUse
from trainer.telemetry import router_plots
from trainer.telemetry.metrics import interaction_record

ALONE = (
    "each token's weights omega are replaced by their sum on one expert and 0 on the others; exact: the share of "
    "documents whose every learnt token is the likeliest after those before it"
)


@dataclass(frozen=True)
class RouterView:
    """What was seen. scores: by way of weighing, `base` (no adapter), `learned` and `expert I` alone."""

    method: str
    tasks: list[str]
    names: list[str]
    document_tasks: np.ndarray
    use: RouterUse
    interaction: Tensor | None
    scores: dict[str, Scores]

    @property
    def experts(self) -> int:
        return self.use.omega.shape[2]

    @property
    def met(self) -> list[int]:
        """Ids of the tasks that have documents."""
        return sorted(set(self.document_tasks.tolist()))

    def of_task(self, task: int) -> np.ndarray:
        """Which documents are of the task: bool [documents]."""
        return self.document_tasks == task

    def best_alone(self, chosen: np.ndarray | slice = slice(None)) -> str:
        """The expert with the least loss alone on the chosen documents."""
        return min(map(alone_name, range(self.experts)), key=lambda way: self.scores[way].mean_loss(chosen))


def alone_name(expert: int) -> str:
    """The way of weighing in which one expert has all."""
    return f"expert {expert}"


def as_json(view: RouterView) -> dict[str, Any]:
    """All numbers of router.json. null, with the reason beside it, for what the method does not have."""
    by_task = {view.tasks[t]: view.of_task(t) for t in view.met}
    everything = slice(None)
    found = {
        "method": view.method,
        "experts": view.experts,
        "documents": {task: int(chosen.sum()) for task, chosen in by_task.items()},
        **view.use.as_json(view.names, view.tasks),
        "interaction": None,
        "alone": {
            "definition": ALONE,
            "ways": {
                way: {
                    **_score_json(scores, everything),
                    "by_task": {task: _score_json(scores, chosen) for task, chosen in by_task.items()},
                }
                for way, scores in view.scores.items()
            },
            "best": view.best_alone(),
            "best_by_task": {task: view.best_alone(chosen) for task, chosen in by_task.items()},
        },
    }
    if view.interaction is None:
        found["does_not_apply"] = {"interaction": _no_interaction(view)}
    else:
        found["interaction"] = view.interaction.tolist()
        found |= interaction_record(view.interaction)
    return found


def _score_json(scores: Scores, chosen: np.ndarray | slice) -> dict[str, float]:
    return {"loss": scores.mean_loss(chosen), "exact": scores.exact_share(chosen)}


def _no_interaction(view: RouterView) -> str:
    return f"{view.method} has no interaction matrix: omega is phi"


def tables(view: RouterView, directory: Path) -> str:
    """Use by task, and how each expert does alone, for a person."""
    tokens = int(view.use.tokens.sum())
    lines = [
        f"routers of {directory}: {view.method}, {view.experts} experts on {len(view.names)} linears; "
        f"{len(view.document_tasks)} held-out documents, {tokens:,} tokens",
        "" if view.interaction is not None else _no_interaction(view),
        "weight: mean omega; leads: share of tokens where an expert's is the largest; entropy: of phi, share of ln k;",
        "apart: how far a task's phi is from that of all tokens, from 0 to 1, mean over linears",
        *_aligned([*_use_rows(view)]),
        "",
        "held-out loss, nats a learnt token, and exact match: without adapter, as learned, each expert alone under the "
        "sum of all weights",
        *_aligned([*_alone_rows(view)]),
    ]
    return "\n".join(line for index, line in enumerate(lines) if line or index != 1)


def _use_rows(view: RouterView) -> Iterator[list[str]]:
    numbers, k = view.use.as_json(view.names, view.tasks), range(view.experts)
    yield ["task", *(f"weight {i}" for i in k), *(f"leads {i}" for i in k), "entropy", "apart"]
    for task in (view.tasks[t] for t in view.met):
        weights = [f"{value:.3f}" for value in numbers["omega_by_task"][task]]
        leads = [f"{value:.0%}" for value in numbers["leading_share_by_task"][task]]
        apart = f"{numbers['task_distance_by_task'][task]:.3f}"
        yield [task, *weights, *leads, f"{numbers['entropy_share_by_task'][task]:.3f}", apart]
    weights = [f"{value:.3f}" for value in numbers["omega"]]
    leads = [f"{value:.0%}" for value in numbers["leading_share"]]
    yield ["all", *weights, *leads, f"{numbers['entropy_share']:.3f}", ""]


def _alone_rows(view: RouterView) -> Iterator[list[str]]:
    yield ["task", *view.scores, "best alone"]
    for name, chosen in [*((view.tasks[t], view.of_task(t)) for t in view.met), ("all", slice(None))]:
        cells = [f"{s.mean_loss(chosen):.3f} {s.exact_share(chosen):4.0%}" for s in view.scores.values()]
        yield [name, *cells, view.best_alone(chosen)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def draw(view: RouterView, folder: Path) -> None:
    """PNG files."""
    met, use = view.met, view.use
    tasks = [view.tasks[t] for t in met]
    panels = {"mean omega": use.by_task(use.omega)[met], "share of tokens led": use.by_task(use.leads)[met]}
    figures = {
        "layers": router_plots.layers_picture(view.names, use.by_layer(use.omega), "mean omega"),
        "tasks": router_plots.tasks_picture(tasks, panels),
        "distances": router_plots.distances_picture(tasks, view.names, use.task_distance()[:, met]),
        "use": router_plots.use_picture(tasks, use.by_task(use.leads)[met]),
        "alone": router_plots.alone_picture({way: scores.mean_loss() for way, scores in view.scores.items()}),
    }
    if view.interaction is not None:
        figures["interaction"] = router_plots.interaction_picture(view.names, view.interaction.numpy())
    for name, figure in figures.items():
        save(figure, folder / f"{name}.png")
