"""Statistics of the routers in training, step by step, and the gradient of the balance loss.

The balance loss is defined on the *global* batch, so that micro-batches, ranks, packing and recomputation change
nothing: with m the mean router weights (phi) [k] of a layer over the real tokens of the last optimizer step,

    loss = weight * mean over layers of sum_i 2 (m_i - 1/k) * mean over this step's tokens of phi_i

which is linear in this step's weights and has the gradient of sum_i (m_i - 1/k)^2, one step delayed. m starts at
1/k. It enters the backward pass through each layer's autograd node, in the proportion in which the task loss does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.adapters.layer import Experts


@dataclass(frozen=True)
class RouterReport:
    """Routers over one optimizer step, averaged over the real tokens of all ranks; fp32 on the CPU, k entries of phi.

    names [layers]: of the adapted linears' `Experts`.
    weights [layers, k], entropy [layers]: mean of phi, and of its entropy in nats.
    task_tokens [tasks]: real tokens. weights_by_task [layers, tasks, k], entropy_by_task [layers, tasks]: NaN for a
    task without tokens in this step.
    interaction [layers, experts, k]: M as this step's forward used it; None where the method has none.
    """

    names: tuple[str, ...]
    weights: Tensor
    entropy: Tensor
    task_tokens: Tensor
    weights_by_task: Tensor
    entropy_by_task: Tensor
    interaction: Tensor | None = None
    renormalized: bool = False

    @property
    def balance(self) -> float:
        """Mean over layers of sum_i (m_i - 1/k)^2: 0 for routers that use all experts equally."""
        return (self.weights - 1 / self.weights.shape[1]).square().sum(1).mean().item()

    @property
    def entropy_share(self) -> float:
        """Mean entropy as a share of its maximum, ln k; 0 for k = 1."""
        k = self.weights.shape[1]
        return self.entropy.mean().item() / math.log(k) if k > 1 else 0.0

    @property
    def omega(self) -> Tensor | None:
        """Mean weights after competition [layers, experts]: M times the mean of phi, since omega = M phi is linear.

        None without M, and where omega is renormalised, which is not linear.
        """
        if self.interaction is None or self.renormalized:
            return None
        return mean_omega(self.interaction, self.weights)


def mean_omega(interaction: Tensor, phi: Tensor) -> Tensor:
    """Mean weights after competition [layers, ..., experts] from mean phi [layers, ..., k]: omega = M phi is linear.

    interaction: M [layers, experts, k].
    """
    return torch.einsum("lij,l...j->l...i", interaction, phi)


def place_of(name: str) -> tuple[int, str]:
    """(decoder layer, kind of linear) of an `Experts` module: ...layers.3.mlp.up_proj.teamlora_experts.default."""
    parts = name.split(".")[:-2]
    return next((int(part) for part in parts if part.isdecimal()), 0), parts[-1]


def by_decoder_layer(names: Sequence[str], values: Tensor) -> dict[int, Tensor]:
    """Means of values [adapted linears, ...] over the linears of each decoder layer."""
    layers = [place_of(name)[0] for name in names]
    index = torch.tensor(layers, device=values.device)
    return {layer: values[index == layer].mean(0) for layer in sorted(set(layers))}


class RouterStats:
    """The routers of one model. The training loop calls, in this order:

    begin_step, then for each micro-batch begin_micro_batch, forward (which calls `capture_loss_grad`), backward and
    end_micro_batch, then end_step. Measuring for reports changes no bit of what is trained.
    """

    def __init__(self, model: nn.Module, num_tasks: int = 1) -> None:
        modules = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
        self.names = list(modules)
        first = next(iter(modules.values()), None)
        layers, k = len(modules), first.router.shape[0] if first else 0
        self.balance_loss_weight = first.balance_loss_weight if first else 0.0
        self.renormalized = first is not None and first.gate.renormalize
        device = first.router.device if first else torch.device("cpu")
        self.means = torch.full((layers, k), 1 / k if k else 0.0, device=device)
        self.loss_gradient: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens = 0
        self._measure = self._balance = False
        self._micro_batch = _Sums.zeros(layers, k, num_tasks, device)
        self._step = _Sums.zeros(layers, k, num_tasks, device)
        self._tasks = torch.arange(num_tasks, device=device)
        self._of_task: Tensor | None = None
        self._interaction: Tensor | None = None
        if first is not None and first.interaction is not None:
            self._interaction = torch.zeros(layers, *first.interaction.shape, device=device)
        for index, module in enumerate(modules.values()):
            module.observer = _LayerObserver(self, index)

    def begin_step(self, tokens: int, measure: bool) -> None:
        """tokens: real tokens of the global batch. measure: whether `end_step` is to return a report."""
        self.tokens = tokens
        self._measure = bool(self.names) and measure
        self._balance = bool(self.names) and self.balance_loss_weight > 0
        self._step.zero_()

    def begin_micro_batch(self, task_ids: Tensor) -> None:
        """task_ids: int [batch, seq], below 0 for padding."""
        tasks = task_ids.flatten()
        self.mask = (tasks >= 0).float()
        self._micro_batch.zero_()
        if self._measure:
            self._of_task = (tasks[:, None] == self._tasks).float()
            self._micro_batch.tokens.copy_(self._of_task.sum(0))

    def capture_loss_grad(self, loss: Tensor) -> Tensor:
        """Returns the same loss; its backward keeps the incoming gradient, accumulation and loss scale included."""
        return _CaptureLossGrad.apply(loss, self)

    def end_micro_batch(self) -> None:
        """After backward, where recomputed forwards have written the same sums once more."""
        self._step.add_(self._micro_batch, by_task=self._measure)

    def end_step(self) -> RouterReport | None:
        """The step's report, None where it was not measured. Collective: one all-reduce, every rank must call it."""
        if not (self._measure or self._balance):
            return None
        self._step.sum_over_ranks(by_task=self._measure)
        self.means = self._step.phi / max(self.tokens, 1)
        return self._report() if self._measure else None

    def _report(self) -> RouterReport:
        sums, count = self._step, self._step.tokens
        found = {
            "weights": self.means,
            "entropy": sums.by_task[:, -1].sum(1) / max(self.tokens, 1),
            "task_tokens": count,
            "weights_by_task": sums.by_task[:, :-1] / count,
            "entropy_by_task": sums.by_task[:, -1] / count,
        }
        if self._interaction is not None:
            found["interaction"] = self._interaction
        found = _on_host(found)
        found["weights_by_task"] = found["weights_by_task"].transpose(1, 2)
        return RouterReport(tuple(self.names), **found, renormalized=self.renormalized)

    def observe(self, layer: int, phi: Tensor, interaction: Tensor | None) -> "_BalanceGradient | None":
        """Takes the weights phi [k, tokens] and the interaction matrix of one layer's forward."""
        if not (self._measure or self._balance) or self.mask is None:
            return None
        # stored, not added: a recomputed forward writes the same values again
        self._micro_batch.phi[layer] = phi.to(self.mask.dtype) @ self.mask
        if self._measure:
            assert self._of_task is not None  # begin_micro_batch
            entropy = torch.special.entr(phi).sum(0, keepdim=True)
            self._micro_batch.by_task[layer] = torch.cat((phi, entropy)).to(self.mask.dtype) @ self._of_task
            if interaction is not None:
                assert self._interaction is not None  # all layers have one, or none has
                self._interaction[layer] = interaction
        if not self._balance:
            return None
        k = phi.shape[0]
        slope = self.balance_loss_weight * 2 * (self.means[layer] - 1 / k) / (len(self.names) * max(self.tokens, 1))
        return _BalanceGradient(self, slope, self.mask)


def _on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors on the CPU, by one copy: on a GPU each copy waits for the work before it."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}


@dataclass(frozen=True)
class _Sums:
    """Over real tokens; fp32.

    phi [layers, k]. by_task [layers, k + 1, tasks]: phi, and its entropy last. tokens [tasks].
    """

    phi: Tensor
    by_task: Tensor
    tokens: Tensor

    @classmethod
    def zeros(cls, layers: int, k: int, tasks: int, device: torch.device) -> "_Sums":
        shapes = (layers, k), (layers, k + 1, tasks), (tasks,)
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    def zero_(self) -> None:
        for part in self._parts(by_task=True):
            part.zero_()

    def add_(self, other: "_Sums", by_task: bool) -> None:
        for part, more in zip(self._parts(by_task), other._parts(by_task), strict=True):
            part += more

    def sum_over_ranks(self, by_task: bool) -> None:
        """Collective: one all-reduce, every rank must call it."""
        if not dist.is_initialized():
            return
        parts = self._parts(by_task)
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))

    def _parts(self, by_task: bool) -> tuple[Tensor, ...]:
        return (self.phi, self.by_task, self.tokens) if by_task else (self.phi,)


@dataclass(frozen=True)
class _LayerObserver:
    router_stats: RouterStats
    layer: int

    def observe(self, phi: Tensor, interaction: Tensor | None) -> "_BalanceGradient | None":
        return self.router_stats.observe(self.layer, phi, interaction)


@dataclass(frozen=True)
class _BalanceGradient:
    """slope [k]: of the balance loss in one token's weights. mask [tokens]: 1 for real tokens."""

    router_stats: RouterStats
    slope: Tensor
    mask: Tensor

    def add_gradient(self, grad_phi: Tensor) -> None:
        loss_gradient = self.router_stats.loss_gradient
        assert loss_gradient is not None  # backward begins at capture_loss_grad
        scaled = (self.slope * loss_gradient).to(grad_phi.dtype)
        grad_phi.addr_(scaled, self.mask.to(grad_phi.dtype))


class _CaptureLossGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, router_stats: RouterStats) -> Tensor:
        ctx.router_stats = router_stats
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.router_stats.loss_gradient = grad
        return grad, None
