"""The methods with the same weights for every token: a loop over experts, from saved tensors, on plain linears."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.support.tiny_adapters import METHODS, plain_model
from trainer.adapters.adapter_config import ExpertLoraConfig


def update(method: str, parameters: Mapping[str, Tensor], omega: Tensor, alpha: float, x: Tensor) -> Tensor:
    """sum_i of the experts' outputs [..., d_out] for x [..., d_in], as each paper scales them."""
    experts = parameters["experts"]
    k, expert_rank, _ = experts.shape
    total = x.new_zeros(*x.shape[:-1], experts.shape[2])
    for i in range(k):
        if method == "hydralora":
            total = total + omega[i] * (x @ parameters["lora_a"].t() @ experts[i])
        else:
            a_i = parameters["lora_a"][i * expert_rank : (i + 1) * expert_rank]
            total = total + k * omega[i] * (x @ a_i.t() @ experts[i])
    return alpha / expert_rank * total


def fixed_gate_model(
    base: Path, method: str, adapter: Mapping[str, Mapping[str, Tensor]], gates: Mapping[str, list[float]], alpha: float
) -> nn.Module:
    """The plain model of a folder, whose adapted linears add the update with fixed gates."""
    model = plain_model(base)
    assert set(adapter) == set(gates)
    for name, parameters in adapter.items():
        omega = torch.tensor(gates[name])

        def add(_linear, inputs, y, parameters=parameters, omega=omega):
            return y + update(method, parameters, omega, alpha, inputs[0])

        model.get_submodule(name).register_forward_hook(add)
    return model


def omega_of(config: ExpertLoraConfig, parameters: Mapping[str, Tensor], token: Tensor) -> Tensor:
    """One token's weights [k] in fp64, as the method's paper defines them."""
    phi = torch.softmax(parameters["router"].double() @ token.double(), 0)
    if not isinstance(config, METHODS["teamlora"]):
        return phi
    omega = parameters["interaction"].double() @ phi
    return omega / omega.sum().clamp(min=0.1) if config.renormalize else omega
