"""Pictures of the routers during training, drawn as often as a small share of the time allows."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.adapters.router_stats import RouterReport, mean_omega
from trainer.telemetry.router_plots import as_pixels, interaction_picture, layers_picture, tasks_picture

SHARE = 0.01  # of training's time that drawing may take
FIRST_GUESS = 2.0  # seconds for a drawing, before one was made: the import of matplotlib is part of it


class RouterImages:
    """Collects measured steps, and draws their means whenever drawing takes at most SHARE of the time so far.

    clock: returns seconds. Lives on rank 0.
    """

    def __init__(self, tasks: Sequence[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._tasks, self._clock = tasks, clock
        self._started = clock()
        self._spent, self._last = 0.0, FIRST_GUESS
        self._newest: RouterReport | None = None
        self._phi = torch.zeros(())  # sums over tokens [layers, tasks, k]
        self._tokens = torch.zeros(())  # [tasks]

    def add(self, report: RouterReport) -> None:
        """Takes a measured step."""
        self._newest = report
        self._phi = self._phi + (report.weights_by_task.nan_to_num() * report.task_tokens[:, None]).cpu()
        self._tokens = self._tokens + report.task_tokens.cpu()

    def due(self) -> bool:
        """Whether there is something to draw, and time for it."""
        elapsed = self._clock() - self._started
        return self._newest is not None and self._spent + self._last <= SHARE * elapsed

    def draw(self) -> dict[str, np.ndarray]:
        """Pictures by TensorBoard tag, uint8 [height, width, 3], of the steps since the last drawing; {} of none.

        Layers x experts shows the weights after competition (omega) where they are known, else phi; M is the newest.
        """
        if self._newest is None:
            return {}
        began = self._clock()
        pixels = {f"router/{name}": as_pixels(figure) for name, figure in self._figures(self._newest).items()}
        self._newest, self._phi, self._tokens = None, torch.zeros(()), torch.zeros(())
        self._last = self._clock() - began
        self._spent += self._last
        return pixels

    def _figures(self, newest: RouterReport) -> dict[str, Any]:
        by_layer, what = self._phi.sum(1) / self._tokens.sum(), "phi"
        by_task = self._phi / self._tokens[:, None]  # NaN for tasks that were not met
        panels = {what: by_task.mean(0).numpy()}
        figures = {}
        if newest.interaction is not None:
            interaction = newest.interaction.cpu()
            figures["interaction"] = interaction_picture(newest.names, interaction.numpy())
            if not newest.renormalized:
                by_layer, what = mean_omega(interaction, by_layer), "omega"
                panels[what] = mean_omega(interaction, by_task).mean(0).numpy()
        figures["layers_x_experts"] = layers_picture(newest.names, by_layer.numpy(), f"mean {what}")
        figures["tasks_x_experts"] = tasks_picture(self._tasks, panels)
        return figures
