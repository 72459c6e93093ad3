"""How routers are used: sums over watched tokens by adapted linear and task."""

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


class RouterWatch:
    """Sums what `gates.observe_routers` shows, over the real tokens of the batches that `begin` announces."""

    def __init__(self, adapters: Sequence[Experts], tasks: int) -> None:
        first = adapters[0]
        outputs, k, device = first.router.shape[0], first.experts.shape[0], first.router.device
        self.tokens = torch.zeros(tasks, device=device)
        # by adapted linear and task: phi, omega, whether an expert leads, entropy of phi
        self.sums = torch.zeros(len(adapters), tasks, outputs + 2 * k + 1, device=device)
        self.sizes = [outputs, k, k, 1]
        self._of_task: Tensor | None = None

    def begin(self, batch: Batch) -> None:
        """The batch that the next forward sees."""
        tasks = torch.arange(len(self.tokens), device=self.tokens.device)
        self._of_task = (batch["task_ids"].flatten() == tasks[:, None]).float()
        self.tokens += self._of_task.sum(1)

    def see(self, index: int, phi: Tensor, omega: Tensor) -> None:
        """One adapter's weights of that forward, [batch, seq, entries]."""
        leads = F.one_hot(omega.argmax(-1), omega.shape[-1]).float()
        entropy = torch.special.entr(phi).sum(-1, keepdim=True)
        self.sums[index] += self._of_task @ torch.cat((phi, omega, leads, entropy), -1).flatten(0, -2)

    def use(self) -> "RouterUse":
        phi, omega, leads, entropy = self.sums.double().cpu().split(self.sizes, -1)
        tokens = self.tokens.double().cpu().numpy()
        return RouterUse(tokens, phi.numpy(), omega.numpy(), leads.numpy(), entropy.squeeze(-1).numpy())


@dataclass(frozen=True)
class RouterUse:
    """Sums over tokens, fp64.

    tokens [tasks]. phi [linears, tasks, phi's entries]. omega, leads [linears, tasks, k]: weights after competition,
    and how often an expert's is the largest. entropy [linears, tasks]: of phi, in nats.
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
        """[linears, tasks]: half the sum over k of |mean phi of the task - mean phi of all tokens|; from 0 to 1."""
        with np.errstate(invalid="ignore"):
            of_task = self.phi / self.tokens[:, None]
        return np.abs(of_task - self.by_layer(self.phi)[:, None]).sum(2) / 2

    def as_json(self, names: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
        """Means by adapted linear, by task and over all, of tasks that have tokens; entropies in nats."""
        most = math.log(self.phi.shape[2]) or 1.0
        met = [index for index, count in enumerate(self.tokens) if count]
        found: dict[str, Any] = {"linears": list(names), "tokens": {tasks[i]: int(self.tokens[i]) for i in met}}
        sums = {"phi": self.phi, "omega": self.omega, "leading_share": self.leads, "entropy": self.entropy}
        for name, values in sums.items():
            by_layer, by_task = self.by_layer(values), self.by_task(values)
            found[name] = by_layer.mean(0).tolist()
            found[f"{name}_by_linear"] = by_layer.tolist()
            found[f"{name}_by_task"] = {tasks[i]: by_task[i].tolist() for i in met}
        found["entropy_share"] = found["entropy"] / most
        found["entropy_share_by_task"] = {task: value / most for task, value in found["entropy_by_task"].items()}
        distance = self.task_distance()
        found["task_distance_by_task"] = {tasks[i]: float(distance[:, i].mean()) for i in met}
        found["task_distance_by_linear"] = distance[:, met].mean(1).tolist()
        means = self.by_layer(self.phi)
        found["balance"] = float(((means - 1 / means.shape[1]) ** 2).sum(1).mean())
        return found
