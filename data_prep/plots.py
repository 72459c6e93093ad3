"""Plots of a prepared set, from its manifest: document lengths per task, row fill, shares per task."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import bin_edges

PLOTS = {"lengths of documents": "lengths.png", "tokens per row": "fill.png", "shares": "shares.png"}
_SHARES = {"documents": "documents", "tokens": "tokens", "labelled_tokens": "labelled tokens"}
_MOST_LINES = 9  # tasks with a separate line


def write_plots(manifest: dict[str, Any], directory: Path) -> None:
    """Writes PNG files about the training split into the prepared set's folder."""
    train, seq_len = manifest["splits"]["train"], manifest["config"]["seq_len"]
    edges = bin_edges(seq_len)
    lengths = _most(train["tasks"])
    _histogram(directory / PLOTS["lengths of documents"], edges, lengths, "tokens per document", "documents")
    filled = {f"{train['fill_rate']:.1%} filled": train["row_tokens"]}
    _histogram(directory / PLOTS["tokens per row"], edges, filled, f"tokens per row of {seq_len}", "rows")
    _bars(directory / PLOTS["shares"], train["tasks"])


def _most(tasks: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
    """Histograms of the tasks with the most documents, and of all others together."""
    by_size = sorted(tasks, key=lambda task: -tasks[task]["documents"])
    shown = {task: tasks[task]["lengths"] for task in by_size[:_MOST_LINES]}
    if others := by_size[_MOST_LINES:]:
        shown[f"{len(others)} others"] = np.sum([tasks[task]["lengths"] for task in others], axis=0).tolist()
    return shown


def _histogram(path: Path, edges: np.ndarray, counts: dict[str, list[int]], x: str, y: str) -> None:
    figure = _figure()
    axes = figure.add_subplot()
    for name, values in counts.items():
        axes.stairs(values, edges, label=plain(name))
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize="small")
    save(figure, path)


def _bars(path: Path, tasks: dict[str, dict[str, Any]]) -> None:
    figure = _figure(max(7.0, 0.35 * len(tasks)))
    axes = figure.add_subplot()
    places, width = np.arange(len(tasks)), 0.8 / len(_SHARES)
    for offset, (key, label) in enumerate(_SHARES.items()):
        values = np.array([counts[key] for counts in tasks.values()], dtype=float)
        axes.bar(places + (offset - 1) * width, values / values.sum(), width, label=label)
    axes.set_xticks(places, list(map(plain, tasks)), rotation=30, ha="right")
    axes.set(ylabel="share of the training split")
    axes.legend(fontsize="small")
    save(figure, path)


def _figure(width: float = 7.0) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    return Figure(figsize=(width, 4), layout="constrained")


def plain(name: str) -> str:
    """The name escaped so that matplotlib shows it literally."""
    return name.replace("$", r"\$")  # matplotlib renders text between two dollar signs as a formula


def save(figure: Any, path: Path) -> None:
    """Writes a PNG file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about letters that the font lacks
        figure.savefig(path, dpi=100)
