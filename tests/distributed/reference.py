"""One process, no DeepSpeed, none of the loop: every row alone, full logits, autograd, torch's AdamW."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from data_prep.encode import IGNORED
from tests.support import scene
from trainer.adapters.attach import attach_adapter
from trainer.adapters.layer import Experts
from trainer.base.loader import load_base
from trainer.recipe import Recipe


@dataclass
class Reference:
    """The adapted model whole in this process, and what its routers saw in the last forward."""

    recipe: Recipe

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.run.seed)
        self.model = attach_adapter(load_base(self.recipe.base, "cpu"), self.recipe.adapter)
        scene.wake_experts(self.model)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.experts = {n: m for n, m in self.model.named_modules() if isinstance(m, Experts)}
        self.means = {n: torch.full((m.router.shape[0],), 1 / m.router.shape[0]) for n, m in self.experts.items()}
        self.seen_phi: dict[str, Tensor] = {}
        for name, module in self.experts.items():
            module.register_forward_hook(lambda m, args, _out, name=name: self._see(name, m, args[0]))

    def _see(self, name: str, module: Experts, x: Tensor) -> None:
        self.seen_phi[name] = torch.softmax(x @ module.router.T, dim=-1)

    def load(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def gradients(self, rows: Sequence[dict[str, Any]]) -> tuple[float, dict[str, Tensor]]:
        """(mean loss a labelled token, gradient by name) of a global batch; then this batch's router means stand."""
        labelled = sum(int((row["labels"][1:] != IGNORED).sum()) for row in rows)
        tokens = sum(len(row["input_ids"]) for row in rows)
        loss = torch.zeros(())
        sums = {name: torch.zeros_like(mean) for name, mean in self.means.items()}
        for row in rows:
            loss = loss + self._row_loss(row)
            for name, phi in self.seen_phi.items():
                sums[name] = sums[name] + phi.flatten(0, 1).sum(0)
        objective = loss / labelled + self._balance({name: s / tokens for name, s in sums.items()})
        found = torch.autograd.grad(objective, list(self.parameters.values()))
        self.means = {name: (s / tokens).detach() for name, s in sums.items()}
        return loss.item() / labelled, dict(zip(self.parameters, found, strict=True))

    def _row_loss(self, row: dict[str, Any]) -> Tensor:
        inputs = {n: torch.from_numpy(row[n])[None] for n in ("input_ids", "position_ids")}
        logits = self.model(**inputs, use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits, torch.from_numpy(row["labels"][1:]), ignore_index=IGNORED, reduction="sum")

    def _balance(self, now: dict[str, Tensor]) -> Tensor:
        """The balance term of routing.py's text: linear in this step's means, with the last step's as coefficients."""
        weight = self.recipe.adapter.balance_loss_weight
        terms = [2 * (self.means[n] - 1 / len(self.means[n])) @ mean for n, mean in now.items()]
        return weight * torch.stack(terms).mean() if terms else torch.zeros(())

    def train(self, steps: Sequence[Sequence[dict[str, Any]]]) -> tuple[list[float], list[float]]:
        """Losses and gradient norms (before clipping) of a run on its own."""
        train = self.recipe.train
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=train.learning_rate, weight_decay=train.weight_decay, eps=train.epsilon
        )
        losses, norms = [], []
        for rows in steps:
            loss, gradients = self.gradients(rows)
            for name, parameter in self.parameters.items():
                parameter.grad = gradients[name]
            norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), train.max_grad_norm)))
            losses.append(loss)
            optimizer.step()
        return losses, norms
