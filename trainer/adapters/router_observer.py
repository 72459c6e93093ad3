"""A finished model's gates: the weights of each token, watched without a change, or all given to one expert."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.fused import RENORMALIZE_FLOOR
from trainer.adapters.layer import Experts

ClusterFacts = Callable[[int, Tensor, Tensor], None]


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """The adapters of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def router_weights(module: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    """phi [..., phi's entries] and omega [..., k] of x [..., d_in], fp32 (TeamLoRA, section 3); without M they are one.

    Both as in the equations: without the factors k and alpha / r_B.
    """
    phi = torch.softmax(F.linear(x.to(module.router.dtype), module.router).float(), -1)
    if module.interaction is None:
        return phi, phi
    omega = F.linear(phi, module.interaction.float())
    if module.gate.renormalize:
        omega = omega / omega.sum(-1, keepdim=True).clamp(min=RENORMALIZE_FLOOR)
    return phi, omega


@contextmanager
def observe_routers(model: nn.Module, see: ClusterFacts) -> Iterator[None]:
    """Within, each forward of adapter `index` calls see(index, phi, omega), both [..., tokens, entries]."""

    def hook(index: int) -> Callable[..., None]:
        return lambda module, args, _output: see(index, *router_weights(module, args[0]))

    handles = [m.register_forward_hook(hook(index)) for index, m in enumerate(find_experts(model).values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def alone(model: nn.Module, expert: int) -> Iterator[None]:
    """Within, `expert` has every token's whole weight, the sum of omega, and the others have none.

    That is an interaction matrix whose row `expert` holds M's sums over experts, and which is 0 elsewhere: for methods
    without M, whose weights sum to 1, a row of ones.
    """
    modules = list(find_experts(model).values())
    kept = [(module.interaction, module.frozen) for module in modules]
    try:
        for module in modules:
            module.interaction, module.frozen = _only(module, expert), None
        yield
    finally:
        for module, (interaction, frozen) in zip(modules, kept, strict=True):
            module.interaction, module.frozen = interaction, frozen


@torch.no_grad()
def _only(module: Experts, expert: int) -> nn.Parameter:
    router, k = module.router, module.experts.shape[0]
    only = torch.zeros(k, router.shape[0], device=router.device)
    only[expert] = 1 if module.interaction is None else module.interaction.float().sum(0)
    return nn.Parameter(only, requires_grad=False)
