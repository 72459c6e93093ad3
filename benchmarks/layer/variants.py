"""What TeamLoRA is compared with on one linear: the leanest LoRA, and MoELoRA as it is published."""

import torch
from torch import Tensor, nn

K = 4


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
