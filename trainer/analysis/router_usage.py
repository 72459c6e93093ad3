"""How a finished run's routers are used: sums over tokens by adapted linear and task."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.adapters.layer import Experts
from trainer.objective.batches import Batch
from trainer.telemetry.router_numbers import task_distance


class RouterUsageCollector:
    """Sums what `router_observer.observe_routers` reports over the real tokens of batches given to `begin_batch`."""

    def __init__(self, adapters: Sequence[Experts], tasks: int) -> None:
        first = adapters[0]
        outputs, k, device = first.router.shape[0], first.experts.shape[0], first.router.device
        self.tokens = torch.zeros(tasks, device=device)
        # by adapted linear and task: phi, omega, whether an expert leads, entropy of phi
        self.sums = torch.zeros(len(adapters), tasks, outputs + 2 * k + 1, device=device)
        self.sizes = [outputs, k, k, 1]
        self.omega_is_phi = first.interaction is None
        self._of_task = torch.zeros(tasks, 0, device=device)  # of the current batch: 0 or 1, [tasks, tokens]

    def begin_batch(self, batch: Batch) -> None:
        """Call with each batch before its forward."""
        tasks = torch.arange(len(self.tokens), device=self.tokens.device)
        self._of_task = (batch["task_ids"].flatten() == tasks[:, None]).float()
        self.tokens += self._of_task.sum(1)

    def observe(self, index: int, phi: Tensor, omega: Tensor) -> None:
        """Adds one adapter's weights in the current forward, [batch, seq, entries]."""
        leads = F.one_hot(omega.argmax(-1), omega.shape[-1]).float()
        entropy = torch.special.entr(phi).sum(-1, keepdim=True)
        self.sums[index] += self._of_task @ torch.cat((phi, omega, leads, entropy), -1).flatten(0, -2)

    def usage(self) -> "RouterUsage":
        phi, omega, leads, entropy = self.sums.double().cpu().split(self.sizes, -1)
        if self.omega_is_phi:
            omega = phi  # a matrix product may round equal columns differently
        tokens = self.tokens.double().cpu().numpy()
        return RouterUsage(tokens, phi.numpy(), omega.numpy(), leads.numpy(), entropy.squeeze(-1).numpy())


@dataclass(frozen=True)
class RouterUsage:
    """Sums over tokens, fp64.

    tokens [tasks]. phi [linears, tasks, entries of phi]. omega [linears, tasks, k]: weights after competition. leads
    [linears, tasks, k]: number of tokens where an expert's omega is the largest. entropy [linears, tasks]: of phi, in
    nats.
    """

    tokens: np.ndarray
    phi: np.ndarray
    omega: np.ndarray
    leads: np.ndarray
    entropy: np.ndarray

    def by_layer(self, sums: np.ndarray) -> np.ndarray:
        """Mean over all tokens, [linears, ...]."""
        return sums.sum(1) / self.tokens.sum()

    def by_task(self, sums: np.ndarray) -> np.ndarray:
        """Mean over a task's tokens and all linears, [tasks, ...]; NaN for tasks without tokens."""
        with np.errstate(invalid="ignore"):
            return sums.mean(0) / self.tokens.reshape(-1, *[1] * (sums.ndim - 2))

    def task_distance(self) -> np.ndarray:
        """[linears, tasks], see `router_numbers.task_distance`."""
        with np.errstate(invalid="ignore"):
            of_task = self.phi / self.tokens[:, None]
        return task_distance(of_task, self.by_layer(self.phi))

    def as_json(self, names: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
        """Means by adapted linear, by task (if it has tokens) and over all; entropies in nats."""
        max_entropy = math.log(self.phi.shape[2]) or 1.0
        present = [index for index, count in enumerate(self.tokens) if count]
        tokens = {tasks[i]: int(self.tokens[i]) for i in present}
        numbers: dict[str, Any] = {"linears": list(names), "tokens": tokens}
        sums = {"phi": self.phi, "omega": self.omega, "leading_share": self.leads, "entropy": self.entropy}
        for name, values in sums.items():
            by_layer, by_task = self.by_layer(values), self.by_task(values)
            numbers[name] = by_layer.mean(0).tolist()
            numbers[f"{name}_by_linear"] = by_layer.tolist()
            numbers[f"{name}_by_task"] = {tasks[i]: by_task[i].tolist() for i in present}
        numbers["entropy_share"] = numbers["entropy"] / max_entropy
        entropies = numbers["entropy_by_task"]
        numbers["entropy_share_by_task"] = {task: value / max_entropy for task, value in entropies.items()}
        distance = self.task_distance()
        numbers["task_distance_by_task"] = {tasks[i]: float(distance[:, i].mean()) for i in present}
        numbers["task_distance_by_linear"] = distance[:, present].mean(1).tolist()
        means = self.by_layer(self.phi)
        numbers["balance"] = float(((means - 1 / means.shape[1]) ** 2).sum(1).mean())
        return numbers
