"""One adapted linear: TeamLoRA and what it is compared with, the leanest LoRA and MoELoRA as it is published."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.adapters import TeamLoraConfig
from trainer.adapters.layer import Experts

K = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Lora(nn.Module):
    """The leanest LoRA: two products, the second added to the base output by its own GEMM, no scale to apply."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, d_in) * d_in**-0.5)
        self.b = nn.Parameter(torch.randn(rank, d_out) * 0.02)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [tokens, d_in], y [tokens, d_out] -> [tokens, d_out]"""
        return torch.addmm(y, x @ self.a.t(), self.b)


class MoeLoraLoop(nn.Module):
    """MoELoRA as its public code computes it: a loop over k pairs (A_i, B_i), each scaled, weighed and added."""

    def __init__(self, d_in: int, d_out: int, expert_rank: int) -> None:
        super().__init__()
        self.scaling = 2.0
        self.router = nn.Linear(d_in, K, bias=False)
        self.a = nn.ModuleList(nn.Linear(d_in, expert_rank, bias=False) for _ in range(K))
        self.b = nn.ModuleList(nn.Linear(expert_rank, d_out, bias=False) for _ in range(K))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [tokens, d_in], y [tokens, d_out] -> [tokens, d_out]"""
        weights = torch.softmax(self.router(x), dim=-1)
        for i in range(K):
            y += self.b[i](self.a[i](x)) * self.scaling * weights[:, i].unsqueeze(-1)
        return y


@dataclass(frozen=True)
class AdaptedLayer:
    """A frozen linear, its input, the gradient of its output, and by name the modules that adapt it."""

    weight: Tensor
    x: Tensor
    upstream: Tensor
    variants: dict[str, nn.Module]

    def forward(self, variant: str) -> Tensor:
        return self.variants[variant](self.x, F.linear(self.x, self.weight))

    def step(self, variant: str) -> None:
        """Forward and backward."""
        self.variants[variant].zero_grad(set_to_none=True)
        self.x.grad = None
        self.forward(variant).backward(self.upstream)


@dataclass(frozen=True)
class Cell:
    """One shape, total rank and dtype."""

    d_in: int
    d_out: int
    total_rank: int
    dtype: str

    def build(self, tokens: int, device: torch.device | str = "cpu") -> AdaptedLayer:
        """The same values at every call."""
        torch.manual_seed(0)
        dtype = DTYPES[self.dtype]
        weight = torch.randn(self.d_out, self.d_in) * self.d_in**-0.5
        x, upstream = torch.randn(tokens, self.d_in), torch.randn(tokens, self.d_out)
        config = TeamLoraConfig(num_experts=K, expert_rank=self.total_rank // K, alpha=16, init_weights=False)
        variants = {
            "lora": Lora(self.d_in, self.d_out, self.total_rank),
            "teamlora": Experts(self.d_in, self.d_out, config),
            "loop": MoeLoraLoop(self.d_in, self.d_out, self.total_rank // K),
        }
        return AdaptedLayer(
            weight.to(device, dtype),
            x.to(device, dtype).requires_grad_(),
            upstream.to(device, dtype),
            {name: module.to(device, dtype) for name, module in variants.items()},
        )
