"""What a training loop knows of its routers: their statistics by step, and the balance loss's gradient.

The balance loss is defined on the *global* batch, so that micro-batches, ranks, packing and recomputation change
nothing: with m the mean router weights (phi) [k] of a layer over the real tokens of the last optimizer step,

    loss = weight * mean over layers of sum_i 2 (m_i - 1/k) * mean over this step's tokens of phi_i

which is linear in this step's weights and has the gradient of sum_i (m_i - 1/k)^2, one step delayed. m starts at
1/k. It enters the backward pass through each layer's autograd node, in the proportion in which the task loss does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.adapters.layer import Experts


@dataclass(frozen=True)
class RouterReport:
    """Routers over one optimizer step, averaged over the real tokens of all ranks.

    weights: mean of phi, fp32 [layers, k]. entropy: mean entropy of phi in nats, fp32 [layers].
    """

    weights: Tensor
    entropy: Tensor

    @property
    def balance(self) -> float:
        """Mean over layers of sum_i (m_i - 1/k)^2: 0 for routers that use their experts alike."""
        return (self.weights - 1 / self.weights.shape[1]).square().sum(1).mean().item()


class Routing:
    """The routers of one model. The loop drives it:

    begin_step, then for each micro-batch begin_micro_batch, forward (which calls `tap`), backward and
    end_micro_batch, then end_step.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
        self.names = list(modules)
        layers, k = len(modules), next((m.router.shape[0] for m in modules.values()), 0)
        self.balance_loss_weight = next((m.balance_loss_weight for m in modules.values()), 0.0)
        device = next((m.router.device for m in modules.values()), torch.device("cpu"))
        self.means = torch.full((layers, k), 1 / k if k else 0.0, device=device)
        self.loss_gradient: Tensor | None = None
        self.mask: Tensor | None = None
        self.tokens = 0
        self._measure = False
        self._micro_batch = torch.zeros(layers, k + 1, device=device)
        self._step = torch.zeros_like(self._micro_batch)
        for index, module in enumerate(modules.values()):
            module.probe = _LayerProbe(self, index)

    def begin_step(self, tokens: int, measure: bool) -> None:
        """tokens: real ones of the global batch. measure: whether the step's report will be wanted."""
        self.tokens = tokens
        self._measure = bool(self.names) and (measure or self.balance_loss_weight > 0)
        self._step.zero_()

    def begin_micro_batch(self, real: Tensor) -> None:
        """real: bool [batch, seq], False for padding."""
        self.mask = real.flatten().float()
        self._micro_batch.zero_()

    def tap(self, loss: Tensor) -> Tensor:
        """The same loss; its backward remembers the gradient that comes in, accumulation and loss scale included."""
        return _Tap.apply(loss, self)

    def end_micro_batch(self) -> None:
        """After backward, where recomputed forwards have written the same sums once more."""
        self._step += self._micro_batch

    def end_step(self) -> RouterReport | None:
        """The step's report, None where it was not measured. Every rank takes part in its one all-reduce."""
        if not self._measure:
            return None
        if dist.is_initialized():
            dist.all_reduce(self._step)
        means = self._step / max(self.tokens, 1)
        self.means = means[:, :-1].clone()
        return RouterReport(weights=self.means, entropy=means[:, -1].clone())

    def observe(self, layer: int, phi: Tensor) -> "_BalanceGradient | None":
        """Takes the weights phi [k, tokens] of one layer's forward."""
        if not self._measure or self.mask is None:
            return None
        entropy = torch.special.entr(phi).sum(0, keepdim=True)
        # stored, not added: a recomputed forward writes the same values again
        self._micro_batch[layer] = torch.cat((phi, entropy)).to(self.mask.dtype) @ self.mask
        if not self.balance_loss_weight:
            return None
        k = phi.shape[0]
        slope = self.balance_loss_weight * 2 * (self.means[layer] - 1 / k) / (len(self.names) * max(self.tokens, 1))
        return _BalanceGradient(self, slope, self.mask)


@dataclass(frozen=True)
class _LayerProbe:
    routing: Routing
    layer: int

    def observe(self, phi: Tensor) -> "_BalanceGradient | None":
        return self.routing.observe(self.layer, phi)


@dataclass(frozen=True)
class _BalanceGradient:
    """slope [k]: of the balance loss in one token's weights. mask [tokens]: 1 for real tokens."""

    routing: Routing
    slope: Tensor
    mask: Tensor

    def add_gradient(self, grad_phi: Tensor) -> None:
        scaled = (self.slope * self.routing.loss_gradient).to(grad_phi.dtype)
        grad_phi.addr_(scaled, self.mask.to(grad_phi.dtype))


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.routing.loss_gradient = grad
        return grad, None
