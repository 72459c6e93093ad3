"""The three methods as their papers write them: token by token, expert by expert; gradients are autograd's.

Shapes as in `trainer.adapters.layer.Experts`. Nothing here is stacked, fused or recomputed.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from trainer.adapters.adapter_config import ExpertLoraConfig, HydraLoraConfig, TeamLoraConfig
from trainer.adapters.layer import ExpertLayer, Experts

SMALLEST_SUM = 0.1


def teamlora(x: Tensor, p: Mapping[str, Tensor], alpha: float, renormalize: bool) -> Tensor:
    """One token's update [d_out] of x [d_in] (TeamLoRA, section 3)."""
    k, expert_rank, d_out = p["experts"].shape
    z = (p["lora_a"] @ x).split(expert_rank)
    phi = torch.softmax(p["router"] @ x, dim=0)
    omega = p["interaction"] @ phi
    if renormalize:
        omega = omega / omega.sum().clamp(min=SMALLEST_SUM)
    update = x.new_zeros(d_out)
    for i in range(k):
        update = update + k * omega[i] * (p["experts"][i].t() @ z[i])
    return alpha / expert_rank * update


def moelora(x: Tensor, p: Mapping[str, Tensor], alpha: float) -> Tensor:
    """The same of MoELoRA: k separate pairs (A_i, B_i) under a softmax router."""
    k, expert_rank, d_out = p["experts"].shape
    phi = torch.softmax(p["router"] @ x, dim=0)
    update = x.new_zeros(d_out)
    for i, (a_i, b_i) in enumerate(zip(p["lora_a"].split(expert_rank), p["experts"], strict=True)):
        update = update + k * phi[i] * (b_i.t() @ (a_i @ x))
    return alpha / expert_rank * update


def hydralora(x: Tensor, p: Mapping[str, Tensor], alpha: float) -> Tensor:
    """The same of HydraLoRA: one A of r_B, whole for each of the k heads B_i."""
    k, expert_rank, d_out = p["experts"].shape
    phi = torch.softmax(p["router"] @ x, dim=0)
    update = x.new_zeros(d_out)
    for i in range(k):
        update = update + phi[i] * (p["experts"][i].t() @ (p["lora_a"] @ x))
    return alpha / expert_rank * update


def loop(config: ExpertLoraConfig, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """y [..., d_out] and the method's update of x [..., d_in], token by token."""
    if isinstance(config, TeamLoraConfig):
        update = partial(teamlora, p=parameters, alpha=config.alpha, renormalize=config.renormalize)
    elif isinstance(config, HydraLoraConfig):
        update = partial(hydralora, p=parameters, alpha=config.alpha)
    else:
        update = partial(moelora, p=parameters, alpha=config.alpha)
    return y + torch.stack([update(token) for token in x.flatten(0, -2)]).view(y.shape)


def copied(experts: Experts, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The parameters of an adapted linear as leaves of their own."""
    return {name: p.detach().to(dtype).requires_grad_() for name, p in experts.named_parameters()}


class LoopLayer(nn.Module):
    """Stands in for an adapted linear: its own base linear, and the loop in fp32, rounded to the base's dtype."""

    def __init__(self, layer: ExpertLayer, config: ExpertLoraConfig) -> None:
        super().__init__()
        self.base_layer, self.config = layer.base_layer, config
        self.parameters_of = [copied(layer.adapters[name], torch.float32) for name in layer.active_adapters]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for parameters in self.parameters_of:
            y = loop(self.config, parameters, x.float(), y.float()).to(y.dtype)
        return y


def with_loops(model: nn.Module, config: ExpertLoraConfig) -> nn.Module:
    """The same model, each adapted linear replaced by the loop over its base linear. Uses `model` up."""
    for name, layer in [*model.named_modules()]:
        if isinstance(layer, ExpertLayer):
            model.set_submodule(name, LoopLayer(layer, config))
    return model


def off(value: Tensor, expected: Tensor) -> float:
    """Relative distance of two tensors, in the Euclidean norm."""
    assert value.shape == expected.shape
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()
