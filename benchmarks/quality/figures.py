"""Pictures of finished cells: the paper's figures, drawn again from our runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.settings import METHODS, TRAINED
from benchmarks.quality.tables import DATA, EXPERT_NUMBERS, Compared

WINDOW = 16  # steps that a loss curve is averaged over
LOOP = "moelora_loop"


def draw(compared: Compared, speed: dict[str, Any] | None, folder: Path) -> list[Path]:
    """Writes a PNG for each figure that there are cells for; returns their paths."""
    figures: dict[str, Figure] = {"losses": losses(compared), "experts": series(compared, "experts", EXPERT_NUMBERS)}
    figures["data"] = series(compared, "share", DATA)
    if speed is not None:
        figures |= {"costs": costs(compared, speed), "times": times(speed)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=110)
    return paths


def panels(count: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * count, 3.6), layout="constrained")
    axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def losses(compared: Compared) -> Figure:
    """Training loss by step, a running mean, and the mean over seeds."""
    figure, (axes,) = panels(1, 7)
    for method in TRAINED:
        curve = np.mean([result.found["train_losses"] for result in compared.of(method)], axis=0)
        smooth = np.convolve(curve, np.ones(WINDOW) / WINDOW, mode="valid")
        axes.plot(np.arange(WINDOW, len(curve) + 1), smooth, label=METHODS[method].label, linewidth=1.2)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps (nats a token)")
    axes.legend(fontsize=8)
    return figure


def costs(compared: Compared, speed: dict[str, Any]) -> Figure:
    """Score against the time of a step and against the number of parameters."""
    figure, (by_time, by_size) = panels(2, 5.2)
    draws = compared.draws()
    for method in TRAINED:
        score = draws.mean(compared.scores(method))
        error = [[100 * (score.mean - score.low)], [100 * (score.high - score.mean)]]
        places = speed["over_lora"][method]["step"]["median"], compared.of(method)[0].found["parameters"] / 1e6
        for axes, place in zip((by_time, by_size), places, strict=True):
            axes.errorbar(place, 100 * score.mean, error, fmt="o", capsize=3, label=METHODS[method].label)
    by_time.set(xlabel="time of a step over LoRA's of rank r_A", ylabel="score (points of 100)")
    by_size.set(xlabel="trained parameters (millions)")
    by_size.legend(fontsize=7)
    return figure


def times(speed: dict[str, Any]) -> Figure:
    """Training step, prefill and decoding of each method over LoRA of rank r_A, with quartiles."""
    methods = [*TRAINED, LOOP]
    labels = [*(METHODS[method].label for method in TRAINED), "MoELoRA, published loop"]
    kinds = ("step", "prefill", "decode")
    figure, axes = panels(len(kinds), 4.4)
    for each, kind in zip(axes, kinds, strict=True):
        found = [speed["over_lora"][method][kind] for method in methods]
        middle = np.array([one["median"] for one in found])
        error = [middle - [one["low"] for one in found], [one["high"] for one in found] - middle]
        each.barh(labels if kind == kinds[0] else range(len(methods)), middle, xerr=error, color="tab:blue", alpha=0.7)
        each.axvline(1, color="black", linewidth=0.8)
        each.invert_yaxis()
        each.set(title=kind, xlabel="over LoRA of rank r_A")
        if kind != kinds[0]:
            each.set_yticks([])
    return figure


def series(compared: Compared, name: str, points: Sequence[dict[str, int]]) -> Figure:
    """Scores along the number of experts or the share of the data."""
    figure, (axes,) = panels(1, 5.5)
    draws = compared.draws()
    for method in ("teamlora", "moelora", *(["lora"] if name == "share" else [])):
        done = [point for point in points if compared.of(method, **point)]
        found = [draws.mean(compared.scores(method, **point)) for point in done]
        middle = np.array([100 * score.mean for score in found])
        error = [middle - [100 * s.low for s in found], [100 * s.high for s in found] - middle]
        axes.errorbar(
            [point[name] for point in done], middle, error, marker="o", capsize=3, label=METHODS[method].label
        )
    axes.set(xlabel={"experts": "experts k, r_A fixed", "share": "percent of the data"}[name], ylabel="score (points)")
    axes.set_xticks([point[name] for point in points])
    axes.legend(fontsize=8)
    return figure
