"""A linear layer with expert adapters on it, in PEFT's frame."""

import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters.adapter_config import ExpertLoraConfig, HydraLoraConfig, MoeLoraConfig, TeamLoraConfig
from trainer.adapters.fused import FrozenExperts, Gate, Parameters, RemoteParameters, RouterObserver, gated_experts


class Experts(nn.Module):
    """One adapter on one linear layer: its parameters, and y + its update of x (TeamLoRA, section 3).

    lora_a       [r_A, d_in]       shared by all experts; MoELoRA's k matrices A_i, stacked; HydraLoRA: [r_B, d_in]
    router       [k, d_in]         phi's entries; another number than k where experts were added or dropped
    interaction  [k, k]            TeamLoRA's M, else None; [k, phi's entries]
    experts      [k, r_B, d_out]   the matrices B_i

    A module with its own forward, because ZeRO-3's hooks gather parameters for a module's forward. `observer`, where a
    training loop has set one, receives the router's weights (see `RouterStats`). `remote` is set where `ExpertParallel`
    gathers the parameters; it may place the experts, and MoELoRA's A_i (`a_by_expert`), on several ranks. `frozen`,
    once `freeze` was called, computes forwards of few tokens.
    """

    def __init__(self, in_features: int, out_features: int, config: ExpertLoraConfig) -> None:
        super().__init__()
        k, expert_rank = config.num_experts, config.expert_rank
        shared = isinstance(config, HydraLoraConfig)
        team = config if isinstance(config, TeamLoraConfig) else None
        self.lora_a = nn.Parameter(torch.empty(expert_rank if shared else config.total_rank, in_features))
        outputs = (team.num_router_outputs if team is not None else None) or k
        self.router = nn.Parameter(torch.empty(outputs, in_features))
        self.interaction = nn.Parameter(torch.empty(k, outputs)) if team is not None else None
        self.experts = nn.Parameter(torch.empty(k, expert_rank, out_features))
        self.gate = Gate(
            heads=1 if shared else k,
            # k slices share the output in the mean, as k omega_i does in TeamLoRA's equation; HydraLoRA has one
            scale=config.alpha / expert_rank * (1 if shared else k),
            renormalize=team is not None and team.renormalize,
        )
        self.dropout = config.dropout
        self.balance_loss_weight = config.balance_loss_weight
        self.observer: RouterObserver | None = None
        self.remote: RemoteParameters | None = None
        self.frozen: FrozenExperts | None = None
        self.a_by_expert = isinstance(config, MoeLoraConfig)
        self.reset_parameters(zero_experts=config.init_weights)

    @torch.no_grad()
    def reset_parameters(self, zero_experts: bool) -> None:
        """Fresh values from torch's global generator: A and router as in nn.Linear, M near the identity, B zero."""
        for matrix in (self.lora_a, self.router):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if self.interaction is not None:
            nn.init.uniform_(self.interaction, -0.1, 0.1)
            self.interaction.fill_diagonal_(1)
        if zero_experts:
            nn.init.zeros_(self.experts)
        else:
            nn.init.normal_(self.experts, std=0.02)

    @torch.no_grad()
    def freeze(self) -> None:
        """Makes forwards of few tokens faster, for parameters that are whole here and do not change any more."""
        if not self.gate.renormalize and self.remote is None:
            self.frozen = FrozenExperts(self.lora_a, self.router, self.interaction, self.experts, self.gate)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., d_in], base output y [..., d_out] -> [..., d_out] in the dtype of y."""
        if self.frozen is not None and self.frozen.serves(x, y):
            return self.frozen(x, y)
        observer = self.observer if self.training else None
        if self.training and self.observer is None and self.balance_loss_weight:
            warnings.warn(
                "balance_loss_weight has no effect: no training loop drives the routers (see RouterStats)",
                stacklevel=2,
            )
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        if self.remote is None:
            parameters: Parameters = self.lora_a, self.router, self.interaction, self.experts
        else:
            parameters = self.remote.edges()
        return gated_experts(x, y, *parameters, self.gate, observer, self.remote)


class ExpertLayer(nn.Module, BaseTunerLayer):
    """A linear layer and its adapters by name. One subclass per method: PEFT distinguishes methods by an attribute."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ExpertLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self.update_layer(adapter_name, config)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The `Experts` of each adapter on this layer."""
        return getattr(self, self.adapter_layer_names[0])

    def update_layer(self, adapter_name: str, config: ExpertLoraConfig) -> None:
        """Adds an adapter on the base layer's device and in its dtype (for packed bases, their compute dtype)."""
        base = cast(nn.Linear, self.get_base_layer())
        self.adapters[adapter_name] = Experts(base.in_features, base.out_features, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.adapters:
                y = self.adapters[name](x, y)
        return y


def freeze_experts(model: nn.Module) -> None:
    """Makes the model generate faster; its adapters must not change afterwards (see `FrozenExperts`)."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.freeze()


class TeamLoraLayer(ExpertLayer):
    adapter_layer_names = ("teamlora_experts",)


class MoeLoraLayer(ExpertLayer):
    adapter_layer_names = ("moelora_experts",)


class HydraLoraLayer(ExpertLayer):
    adapter_layer_names = ("hydralora_experts",)
