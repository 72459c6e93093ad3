"""Markdown tables of finished cells, and the numbers that matter most."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.quality.intervals import Draws, Scores, stacked
from benchmarks.quality.plan import LEARNING_RATES, SEEDS, TUNING_SEED, trial_cells, tuning_cells
from benchmarks.quality.results import Result, best_rates, mean, mean_loss
from benchmarks.quality.settings import EXPERTS, METHODS, THREE, TRAINED, TRIALS, Cell

SAME_FUNCTION = {  # rows that need no cells of their own
    "collaboration only: M fixed to the identity": "moelora",
    "competition only: separate A_i, and M": "teamlora",
}
BASE = Cell("base", 0, 0.0).name
EXPERT_NUMBERS = [{"experts": k} for k in (1, 2, EXPERTS, 8)]
DATA = [{"share": share} for share in (25, 50, 100)]


class Compared:
    """The finished cells that are compared, by method, number of experts and share of the data."""

    def __init__(self, results: dict[str, Result]) -> None:
        self.results = results
        self.rates = best_rates(results)
        self.seeds = [seed for seed in SEEDS if all(self._has(method, seed) for method in TRAINED)]

    def _has(self, method: str, seed: int, experts: int = EXPERTS, share: int = 100) -> bool:
        return method in self.rates and self._cell(method, seed, experts, share).name in self.results

    def _cell(self, method: str, seed: int, experts: int, share: int) -> Cell:
        return Cell(method, seed, self.rates[method], experts, share)

    def of(self, method: str, experts: int = EXPERTS, share: int = 100) -> list[Result]:
        """Its cells of all seeds that every method has; of the bare base, its one cell as often. [] where any lacks."""
        if method == BASE:
            return [self.results[BASE]] * len(self.seeds) if BASE in self.results else []
        if not all(self._has(method, seed, experts, share) for seed in self.seeds):
            return []
        return [self.results[self._cell(method, seed, experts, share).name] for seed in self.seeds]

    def scores(self, method: str, experts: int = EXPERTS, share: int = 100) -> Scores:
        return stacked([result.found["scores"] for result in self.of(method, experts, share)])

    def draws(self) -> Draws:
        scores = self.of("teamlora")[0].found["scores"]
        return Draws({task: len(items) for task, items in scores.items()}, len(self.seeds))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def methods_table(compared: Compared, speed: dict[str, Any] | None) -> str:
    """Parameters, learning rate, mean score over tasks with its interval, loss, TeamLoRA's lead, and times."""
    heads = ["method", "parameters", "learning rate", "score", "loss", "TeamLoRA less it", "step", "prefill", "decode"]
    draws, ours = compared.draws(), compared.scores("teamlora")
    rows = []
    for method in METHODS:
        if not (found := compared.of(method)):
            continue
        scores = compared.scores(method)
        lead = "" if method == "teamlora" else points(draws.difference(ours, scores), signed=True)
        rows.append(
            [
                METHODS[method].label,
                f"{found[0].found['parameters']:,}" if method != BASE else "0",
                f"{compared.rates[method]:g}" if method != BASE else "",
                points(draws.mean(scores)),
                f"{mean([mean_loss(result) for result in found]):.3f}",
                lead,
                *times(method, speed),
            ]
        )
    for label, method in SAME_FUNCTION.items():
        rows.append([label, f"the function of {METHODS[method].label}", *[""] * (len(heads) - 2)])
    return table(heads, rows)


def points(found: Any, signed: bool = False) -> str:
    """In points of a hundred, with the interval."""
    sign = "+" if signed else ""
    return f"{100 * found.mean:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"


def times(method: str, speed: dict[str, Any] | None) -> list[str]:
    """Of a training step, a prefill and a decoded token, over those of LoRA with rank r_A."""
    if speed is None or method not in speed["over_lora"]:
        return [""] * 3
    return [f"{speed['over_lora'][method][kind]['median']:.2f}" for kind in ("step", "prefill", "decode")]


def tasks_table(compared: Compared) -> str:
    found = {method: compared.scores(method) for method in METHODS if compared.of(method)}
    metrics = compared.of("teamlora")[0].found["metrics"]
    rows = [
        [task, metrics[task], *(f"{100 * scores[task].mean():.1f}" for scores in found.values())] for task in metrics
    ]
    return table(["task", "metric", *(METHODS[method].label for method in found)], rows)


def tuning_table(compared: Compared) -> str:
    """Mean validation loss over tasks by method and learning rate."""
    rows = []
    for method in TRAINED:
        cells = {c.learning_rate: c.name for c in tuning_cells() if c.method == method and c.name in compared.results}
        losses = [f"{mean_loss(compared.results[cells[r]]):.3f}" if r in cells else "" for r in LEARNING_RATES]
        rows.append([METHODS[method].label, *losses, f"{compared.rates[method]:g}" if method in compared.rates else ""])
    return table(["method", *(f"{rate:g}" for rate in LEARNING_RATES), "chosen"], rows)


def trials_table(compared: Compared) -> str:
    """Mean validation loss over tasks by trial and method."""
    cells = {("", m): Cell(m, TUNING_SEED, compared.rates[m], tuning=True) for m in THREE}
    cells |= {(cell.trial, cell.method): cell for cell in trial_cells(compared.rates)}
    found = {key: compared.results[cell.name] for key, cell in cells.items() if cell.name in compared.results}
    losses = {key: f"{mean_loss(result):.3f}" for key, result in found.items()}
    labels = {"": "as in the table above", **{name: trial.label for name, trial in TRIALS.items()}}
    rows = [[label, *(losses.get((trial, method), "") for method in THREE)] for trial, label in labels.items()]
    return table(["trial", *(METHODS[method].label for method in THREE)], rows)


def series_table(compared: Compared, name: str, points_of: Sequence[dict[str, int]], methods: Sequence[str]) -> str:
    """Scores along one setting, such as {"experts": 1}, {"experts": 2}."""
    draws = compared.draws()
    rows = []
    for method in methods:
        found = [compared.scores(method, **point) if compared.of(method, **point) else None for point in points_of]
        rows.append([METHODS[method].label, *(points(draws.mean(scores)) if scores else "" for scores in found)])
    return table([name, *(str(next(iter(point.values()))) for point in points_of)], rows)


def all_tables(compared: Compared, speed: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """By name, those for which there are cells."""
    yield "learning rates", tuning_table(compared)
    if set(THREE) <= set(compared.rates):
        yield "trials", trials_table(compared)
    if not compared.seeds:
        return
    yield "methods", methods_table(compared, speed)
    yield "tasks", tasks_table(compared)
    yield "experts", series_table(compared, "experts (k), r_A fixed", EXPERT_NUMBERS, ("teamlora", "moelora"))
    yield "data", series_table(compared, "percent of the data", DATA, ("teamlora", "moelora", "lora"))


def numbers(compared: Compared, speed: dict[str, Any] | None) -> dict[str, float]:
    """The last line of --table."""
    methods = [method for method in METHODS if compared.of(method)]
    found: dict[str, float] = {"methods": len(methods), "seeds": len(compared.seeds)}
    if compared.seeds:
        draws, ours = compared.draws(), compared.scores("teamlora")
        for other in ("lora", "moelora"):
            lead = draws.difference(ours, compared.scores(other))
            key = f"teamlora_minus_{other}"
            found |= {key: round(lead.mean, 4), f"{key}_low": round(lead.low, 4), f"{key}_high": round(lead.high, 4)}
    if speed is not None:
        found["teamlora_time_over_moelora_loop"] = speed["teamlora_over_moelora_loop"]["step"]["median"]
    return found
