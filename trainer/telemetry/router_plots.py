"""Pictures of routers: weights by layer and by task, interaction matrices, use by task, experts alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.plots import plain
from trainer.adapters.router_stats import place_of

_DPI = 80


def layers_picture(names: Sequence[str], weights: np.ndarray, what: str) -> Any:
    """Heat maps decoder layers x experts of weights [adapted linears, experts], one for each kind of linear."""
    kinds = _by_kind(names)
    layers = max(len(indices) for indices in kinds.values())
    figure = _figure(1.5 + 1.2 * len(kinds), 1.5 + 0.14 * layers)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, (kind, indices) in zip(axes, kinds.items(), strict=True):
        image = axis.imshow(weights[indices], aspect="auto", **_around_alike(weights))
        rows = [place_of(names[i])[0] for i in indices] if axis is axes[0] else []
        _label(axis, plain(kind), range(weights.shape[1]), rows)
        axis.set(xlabel="expert")
    axes[0].set(ylabel="decoder layer")
    figure.colorbar(image, ax=axes, label=what)
    return figure


def tasks_picture(tasks: Sequence[str], panels: dict[str, np.ndarray]) -> Any:
    """Heat maps tasks x experts of values [tasks, experts], numbers written in; NaN stays blank.

    Experts of one number in two layers have nothing in common, so means over layers are near 1/k whatever a router
    does; `distances_picture` shows whether it treats tasks differently.
    """
    experts = max(values.shape[1] for values in panels.values())
    figure = _figure(2 + (1 + 0.6 * experts) * len(panels), 1.5 + 0.28 * len(tasks))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        axis.imshow(values, aspect="auto", **_around_alike(values))
        _label(axis, title, range(values.shape[1]), list(map(plain, tasks)) if axis is axes[0] else [])
        _write_numbers(axis, values)
        axis.set(xlabel="expert")
    return figure


def interaction_picture(names: Sequence[str], interaction: np.ndarray) -> Any:
    """Mean of M - 1 (of M where it is not square) for each kind of linear; M [adapted linears, experts, entries]."""
    kinds = _by_kind(names)
    square = interaction.shape[1] == interaction.shape[2]
    matrices = interaction - np.eye(interaction.shape[1]) if square else interaction
    means = {kind: matrices[indices].mean(0) for kind, indices in kinds.items()}
    largest = max(np.abs(mean).max() for mean in means.values()) or 1.0
    figure = _figure(1 + 2.2 * len(kinds), 3)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axis, (kind, mean) in zip(axes, means.items(), strict=True):
        axis.imshow(mean, cmap="RdBu_r", vmin=-largest, vmax=largest)
        _label(axis, plain(kind), range(mean.shape[1]), range(mean.shape[0]) if axis is axes[0] else [])
        _write_numbers(axis, mean)
        axis.set(xlabel="entry of phi")
    axes[0].set(ylabel="expert")
    figure.suptitle("M - 1" if square else "M", fontsize="small")
    return figure


def distances_picture(tasks: Sequence[str], names: Sequence[str], distances: np.ndarray) -> Any:
    """Heat map tasks x decoder layers: half the sum over experts of |mean phi of the task - mean phi of all tokens|.

    distances [adapted linears, tasks]. 0: the layer's routers treat the task as any other; 1: experts of its own.
    """
    layers = sorted({place_of(name)[0] for name in names})
    at = np.array([place_of(name)[0] for name in names])
    values = np.stack([distances[at == layer].mean(0) for layer in layers], 1)
    figure = _figure(2.5 + 0.2 * len(layers), 1.5 + 0.28 * len(tasks))
    axis = figure.add_subplot()
    image = axis.imshow(values, aspect="auto", vmin=0)
    _label(axis, "how far a task's weights are from those of all tokens", layers, list(map(plain, tasks)))
    axis.set(xlabel="decoder layer")
    figure.colorbar(image, ax=axis)
    return figure


def use_picture(tasks: Sequence[str], shares: np.ndarray) -> Any:
    """Stacked bars: the share of each task's tokens that each expert leads, from shares [tasks, experts]."""
    figure = _figure(max(5, 1.5 + 0.5 * len(tasks)), 4)
    axis = figure.add_subplot()
    below = np.zeros(len(tasks))
    for expert, share in enumerate(shares.T):
        axis.bar(range(len(tasks)), share, bottom=below, label=f"expert {expert}")
        below = below + share
    axis.set_xticks(range(len(tasks)), list(map(plain, tasks)), rotation=30, ha="right")
    axis.set(ylabel="share of tokens led")
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def alone_picture(losses: dict[str, float]) -> Any:
    """Bars of the held-out loss by way of weighing."""
    figure = _figure(max(5, 1 + 0.8 * len(losses)), 4)
    axis = figure.add_subplot()
    axis.bar_label(axis.bar(list(losses), list(losses.values())), fmt="%.3f", fontsize="small")
    axis.tick_params(axis="x", rotation=30)
    axis.set(ylabel="held-out loss, nats a labelled token")
    return figure


def as_pixels(figure: Any) -> np.ndarray:
    """The figure drawn: uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _by_kind(names: Sequence[str]) -> dict[str, list[int]]:
    """Indices of the adapted linears of each kind, as up_proj, in the order of layers."""
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        kinds.setdefault(place_of(name)[1], []).append(index)
    return kinds


def _around_alike(weights: np.ndarray) -> dict[str, Any]:
    """A colour scale around 1/k, the weight of equally used experts; at least 0.05 to each side."""
    middle = 1 / weights.shape[-1]
    reach = max(0.05, np.nanmax(np.abs(weights - middle)))
    return {"cmap": "PuOr_r", "vmin": middle - reach, "vmax": middle + reach}


def _label(axis: Any, title: str, columns: Sequence[Any], rows: Sequence[Any]) -> None:
    axis.set_title(title, fontsize="small")
    for ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        every = 1 if names and isinstance(names[0], str) else max(1, len(names) // 16)  # numbers run into one another
        ticks(range(0, len(names), every), names[::every], fontsize="small")


def _write_numbers(axis: Any, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color="black")
