"""The gated low-rank update of TeamLoRA, MoELoRA and HydraLoRA as one autograd function.

All three are a LoRA whose low-rank activations pass a gate that depends on the token:

    [z ; logits] = [A ; S] x^T        one GEMM
    phi   = softmax(logits)           fp32, k weights a token
    omega = M phi                     TeamLoRA's competition; without M, omega = phi
    out   = y + gate(z, scale * omega)^T B     one GEMM, accumulated onto the base output

For backward only x (which is there anyway: y was computed from it) and [z ; logits] are saved: what LoRA
saves, plus k values a token. phi, omega and the gated z are cheap and are computed again.

Low-rank activations are held transposed, [rank, tokens]. Softmax, gate and their sums then run along
rows as long as there are tokens, where rows of k or r_B values cost up to fifteen times as much on a
CPU; and the operands of every GEMM stay aligned although r_A + k is no multiple of 8.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

RENORMALIZE_FLOOR = 0.1
"""Smallest sum of omega that renormalisation divides by. A trained M can drive the sum to zero or below;
with the floor the weights grow tenfold at most, stay finite and keep their signs."""

FEW_TOKENS = 64
"""Up to so many in one forward `FrozenExperts` is the quicker way."""


@dataclass(frozen=True)
class Gate:
    """The constants of one adapter's gate.

    scale multiplies omega. heads is the number of slices that A's output is cut into: k when every
    expert has a slice of its own (TeamLoRA, MoELoRA), 1 when all experts share the whole (HydraLoRA).
    """

    heads: int
    scale: float
    renormalize: bool = False


Parameters = tuple[Tensor, Tensor, Tensor | None, Tensor]
"""lora_a, router, interaction (None where there is none) and experts."""


class BalanceTerm(Protocol):
    """The balance loss as the backward pass sees it."""

    def add_gradient(self, grad_phi: Tensor) -> None:
        """Adds the balance loss's gradient to grad_phi [k, tokens], in place."""


class RouterObserver(Protocol):
    """Receives the router's weights of each training forward."""

    def observe(self, phi: Tensor, interaction: Tensor | None) -> BalanceTerm | None:
        """Takes phi [k, tokens] and M as used; returns the term whose gradient the backward pass adds, if any."""


class Dispatcher(Protocol):
    """The experts' product where tokens go to the experts' owners (trainer.distributed.token_dispatcher)."""

    def add(self, y: Tensor, gated: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """y plus all experts' output, and what `backward` will need."""

    def backward(self, grad: Tensor, received: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gated and of this rank's own experts, from that of the output."""


class RemoteParameters(Protocol):
    """The source of parameters that are gathered from several ranks (trainer.distributed.expert_parallel).

    Autograd sees edges of its graph in their place, which hold no values.
    """

    @property
    def dispatcher(self) -> Dispatcher | None:
        """The exchange of this forward's tokens; None where weights travel."""

    def edges(self) -> Parameters:
        """Stand-ins for the parameters."""

    def values(self, backward: bool) -> Parameters:
        """The parameters' values; with an exchange the experts are this rank's own [k / n, r_B, d_out]."""


class GatedExperts(torch.autograd.Function):
    """y + scale * sum_i omega_i B_i z_i; see the module's text. Called through `gated_experts`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        a: Tensor,
        router: Tensor,
        interaction: Tensor | None,
        experts: Tensor,
        gate: Gate,
        dtype: torch.dtype,
        observer: RouterObserver | None,
        remote: RemoteParameters | None,
    ) -> Tensor:
        ctx.remote, ctx.dispatcher = remote, remote.dispatcher if remote is not None else None
        # x and the parameters as they came: nothing but `projected` is new memory. ZeRO-3 may free the
        # parameters' data in between; it gathers them into the same tensors again before backward.
        kept = a, router, interaction, experts
        if remote is not None:
            a, router, interaction, experts = remote.values(backward=False)
        projected = torch.cat((a, router)).to(dtype) @ _rows(x, dtype).t()
        z, logits = _split(projected, len(a), gate)
        phi = _softmax(logits)
        weights, _ = _compete(phi, _scaled(interaction, gate, phi.dtype), gate)
        gated = _apply_gate(z, weights)
        ctx.balance = observer.observe(phi, interaction) if observer is not None else None
        ctx.gate, ctx.dtype = gate, dtype
        if ctx.dispatcher is None:
            out, received = _accumulate(y, gated, experts.flatten(0, 1).to(dtype)), None
        else:
            out, received = ctx.dispatcher.add(y, gated, experts.to(dtype))
        ctx.save_for_backward(x, projected, *kept, received)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what once_differentiable is for, at a fraction of its cost
            raise RuntimeError("gated experts have no second derivative: call backward without create_graph")
        x, projected, a, router, interaction, experts, received = ctx.saved_tensors
        gate, dtype = ctx.gate, ctx.dtype
        if ctx.remote is not None:
            a, router, interaction, experts = ctx.remote.values(backward=True)
        want_x, want_y, want_a, want_router, want_interaction, want_experts = ctx.needs_input_grad[:6]
        grad_x = grad_a = grad_router = grad_experts = None
        grad = _rows(grad_out, dtype)
        z, logits = _split(projected, len(a), gate)
        phi = _softmax(logits)
        mixing = _scaled(interaction, gate, phi.dtype)
        weights, total = _compete(phi, mixing, gate)

        if ctx.dispatcher is not None:
            grad_gated, grad_experts = ctx.dispatcher.backward(grad, received, experts.to(dtype))
            grad_experts = grad_experts.to(experts.dtype)
        else:
            # grad is the left operand, the small result is transposed: the other way all of grad would be packed
            grad_gated = (grad @ experts.flatten(0, 1).to(dtype).t()).t().contiguous()
            if want_experts:
                grad_experts = _mm(_apply_gate(z, weights), grad, experts.shape).to(experts.dtype)
        grad_gated = grad_gated.unflatten(0, (len(weights), -1))

        grad_weights = (grad_gated * z).sum(1, dtype=phi.dtype)
        grad_phi, grad_interaction = _compete_backward(grad_weights, phi, weights, total, mixing, gate)
        if ctx.balance is not None:
            ctx.balance.add_gradient(grad_phi)
        grad_projected = torch.empty_like(projected)
        grad_z, grad_logits = _split(grad_projected, len(a), gate)
        grad_logits.copy_(_softmax_backward(grad_phi, phi))
        _apply_gate_backward(grad_gated, weights, out=grad_z)

        if want_x:
            grad_x = _mm(grad_projected.t(), torch.cat((a, router)).to(dtype), x.shape).to(x.dtype)
        if want_a or want_router:
            grad_a, grad_router = (grad_projected @ _rows(x, dtype)).to(a.dtype).split([len(a), len(router)])
        if grad_interaction is not None:
            grad_interaction = grad_interaction.to(interaction.dtype) if want_interaction else None
        grad_y = grad_out if want_y else None
        return grad_x, grad_y, grad_a, grad_router, grad_interaction, grad_experts, None, None, None, None


def gated_experts(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    router: Tensor,
    interaction: Tensor | None,
    experts: Tensor,
    gate: Gate,
    observer: RouterObserver | None = None,
    remote: RemoteParameters | None = None,
) -> Tensor:
    """Add the gated experts' update of x to the base output y, out of place, in y's dtype.

    x [..., d_in], y [..., d_out], a [r_A, d_in] (HydraLoRA: [r, d_in]), router [j, d_in], interaction
    [k, j] or None for j = k, experts [k, r_B, d_out]. GEMMs run in a's dtype, or in autocast's where that is on;
    the softmax and the product with the interaction matrix in fp32 (fp64 for fp64 parameters).
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return GatedExperts.apply(x, y, a, router, interaction, experts, gate, a.dtype, observer, remote)
    dtype = torch.get_autocast_dtype(device)
    # autocast does not reach the backward of a custom function: the dtype is decided here, for both
    with torch.autocast(device, enabled=False):
        return GatedExperts.apply(x, y, a, router, interaction, experts, gate, dtype, observer, remote)


class FrozenExperts:
    """`gated_experts` for few tokens of an adapter that does not learn any more: generation, a token at a time.

    There the cost is not arithmetic but the number of operations and bytes. So A and the router are joined once,
    scale * M gets a column for each low-rank activation, and activations lie in rows, [tokens, rank]:

        [z, logits] = x [A ; S]^T        out = y + (z * softmax(logits) W) B        W [j, k r_B]: scale * M, r_B times

    Holds a copy of A: the parameters must not change afterwards.
    """

    def __init__(self, a: Tensor, router: Tensor, interaction: Tensor | None, experts: Tensor, gate: Gate) -> None:
        if gate.renormalize:
            raise ValueError("renormalised weights have no product with a constant matrix")
        k, expert_rank, _ = experts.shape
        mixing = _scaled(interaction, gate, torch.promote_types(a.dtype, torch.float32))
        if mixing is None:
            mixing = torch.eye(k, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device) * gate.scale
        self._projection = torch.cat((a, router)).t()
        self._rank = len(a)
        self._weights = mixing.t().repeat_interleave(expert_rank, 1)
        self._repeats = k if gate.heads == 1 else 1
        self._experts = experts.flatten(0, 1)

    def serves(self, x: Tensor, y: Tensor) -> bool:
        """Whether this is the quicker way, and gives what `gated_experts` would."""
        return (
            x.numel() <= FEW_TOKENS * x.shape[-1]
            and not torch.is_grad_enabled()
            and x.dtype == y.dtype == self._experts.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., d_in], y [..., d_out], both in the parameters' dtype -> [..., d_out]."""
        projected = x.reshape(-1, x.shape[-1]) @ self._projection
        z, logits = projected[:, : self._rank], projected[:, self._rank :]
        if self._repeats > 1:
            z = z.repeat(1, self._repeats)
        weights = torch.softmax(logits, 1, dtype=self._weights.dtype) @ self._weights
        gated = z * weights.to(z.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), gated, self._experts).view(y.shape)


def gate_weights(x: Tensor, router: Tensor, interaction: Tensor | None, gate: Gate) -> tuple[Tensor, Tensor]:
    """phi [phi's entries, tokens] and omega [k, tokens] of every token of x [..., d_in]; fp32 (TeamLoRA, section 3).

    Both as in the equations, without the factors k and alpha / r_B. Without M omega is phi.
    """
    phi = _softmax(router @ _rows(x, router.dtype).t())
    if interaction is None:
        return phi, phi
    weights, _ = _compete(phi, _scaled(interaction, gate, phi.dtype), gate)
    return phi, weights / gate.scale


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., n] -> [tokens, n] in the compute dtype."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _split(projected: Tensor, rank: int, gate: Gate) -> tuple[Tensor, Tensor]:
    """[rank + k, tokens] -> views z [heads, r_B, tokens] and logits [k, tokens]."""
    return projected[:rank].unflatten(0, (gate.heads, -1)), projected[rank:]


def _mm(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """left @ right in another shape, as a tensor that is no view.

    Autograd adds gradients in place only into tensors that own their memory; a view costs a copy.
    """
    result = left.new_empty(shape)
    torch.mm(left, right, out=result.view(left.shape[0], right.shape[1]))
    return result


def _accumulate(y: Tensor, gated: Tensor, experts: Tensor) -> Tensor:
    """y + gated^T @ experts in y's shape and dtype.

    Never in place: y may be a view (DeepSpeed's hooks return one) or be kept by its own backward.
    """
    if y.dtype != gated.dtype:
        # an fp32 adapter on a bf16 base adds in fp32 and rounds once, as PEFT's LoRA does
        return (y + _mm(gated.t(), experts, y.shape)).to(y.dtype)
    out = y.clone(memory_format=torch.contiguous_format)
    out.view(-1, out.shape[-1]).addmm_(gated.t(), experts)
    return out


def _softmax(logits: Tensor) -> Tensor:
    """Over experts, [k, tokens], at least in fp32."""
    return torch.softmax(logits, 0, dtype=torch.promote_types(logits.dtype, torch.float32))


def _softmax_backward(grad: Tensor, phi: Tensor) -> Tensor:
    return torch._softmax_backward_data(grad, phi, 0, phi.dtype)


def _scaled(interaction: Tensor | None, gate: Gate, dtype: torch.dtype) -> Tensor | None:
    """scale * M, in the dtype of phi."""
    return None if interaction is None else interaction.to(dtype) * gate.scale


def _compete(phi: Tensor, mixing: Tensor | None, gate: Gate) -> tuple[Tensor, Tensor | None]:
    """Weights scale * M phi [k, tokens], and the guarded sums [tokens] they were divided by if renormalised.

    mixing: scale * M [k, k], or None for M = 1.
    """
    if mixing is None:
        return phi * gate.scale, None
    weights = mixing @ phi
    if not gate.renormalize:
        return weights, None
    total = weights.sum(0).div_(gate.scale).clamp_(min=RENORMALIZE_FLOOR)
    return weights.div_(total), total


def _compete_backward(
    grad: Tensor, phi: Tensor, weights: Tensor, total: Tensor | None, mixing: Tensor | None, gate: Gate
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `_compete` for phi and for M."""
    if total is not None:
        # weights = scale * omega / total: at the floor total is a constant, above it the quotient rule holds
        through_total = (grad * weights).sum(0).mul_(total > RENORMALIZE_FLOOR).div_(gate.scale)
        grad = (grad - through_total).div_(total)
    if mixing is None:
        return grad * gate.scale, None
    return mixing.t() @ grad, (grad @ phi.t()).mul_(gate.scale)


def _apply_gate(z: Tensor, weights: Tensor) -> Tensor:
    """z [heads, r_B, tokens] under weights [k, tokens] -> [k * r_B, tokens]; one head serves every expert."""
    return (z * weights.to(z.dtype).unsqueeze(1)).flatten(0, 1)


def _apply_gate_backward(grad_gated: Tensor, weights: Tensor, out: Tensor) -> None:
    """Gradient of `_apply_gate` for z, from [k, r_B, tokens] into out [heads, r_B, tokens]."""
    weights = weights.to(out.dtype).unsqueeze(1)
    if len(out) == 1:
        torch.sum(grad_gated * weights, 0, keepdim=True, out=out)
    else:
        torch.mul(grad_gated, weights, out=out)
