"""Looks at the routers of a finished model, token by token, or gives every token's whole weight to one expert."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer.adapters.fused import gate_weights
from trainer.adapters.layer import Experts

Observe = Callable[[int, Tensor, Tensor], None]


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """The `Experts` modules of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def router_weights(module: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    """phi [..., phi's entries] and omega [..., k] of x [..., d_in]; fp32, see `gate_weights`."""
    weights = gate_weights(x, module.router, module.interaction, module.gate)
    phi, omega = (each.t().unflatten(0, x.shape[:-1]).float() for each in weights)
    return phi, omega


@contextmanager
def observe_routers(model: nn.Module, observe: Observe) -> Iterator[None]:
    """Within, each forward of the adapter `index` calls observe(index, phi, omega), both [..., tokens, entries]."""

    def make_hook(index: int) -> Callable[..., None]:
        return lambda module, args, _output: observe(index, *router_weights(module, args[0]))

    handles = [m.register_forward_hook(make_hook(index)) for index, m in enumerate(find_experts(model).values())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def only_expert(model: nn.Module, expert: int) -> Iterator[None]:
    """Within, `expert` has every token's whole weight, the sum of omega, and the other experts have none.

    That is an interaction matrix whose row `expert` holds M's sums over experts, and whose other rows are 0. For
    methods without M, whose weights sum to 1, it is a row of ones.
    """
    modules = list(find_experts(model).values())
    kept = [(module.interaction, module.frozen) for module in modules]
    try:
        for module in modules:
            module.interaction, module.frozen = _interaction_of_one(module, expert), None
        yield
    finally:
        for module, (interaction, frozen) in zip(modules, kept, strict=True):
            module.interaction, module.frozen = interaction, frozen


@torch.no_grad()
def _interaction_of_one(module: Experts, expert: int) -> nn.Parameter:
    router, k = module.router, module.experts.shape[0]
    matrix = torch.zeros(k, router.shape[0], device=router.device)
    matrix[expert] = 1 if module.interaction is None else module.interaction.float().sum(0)
    return nn.Parameter(matrix, requires_grad=False)
