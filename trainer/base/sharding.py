"""How a parameter's elements are divided among ranks, and the plain case of one process that keeps all."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class ShardingStrategy(Protocol):
    """Decides which part of every parameter this rank loads, and where it stays.

    A parameter of n elements is cut into `world` runs of ceil(n / world); the last may be short or empty. `device` is
    where pieces are computed, which with offload is not where they are kept.
    """

    rank: int
    world: int
    device: torch.device

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros of ceil(numel / world) elements, where this rank's run of a parameter will stay."""

    def gather(self, mine: Tensor) -> Tensor:
        """Equally long 1-D tensors of all ranks, concatenated in the order of ranks, on every rank."""

    def keep(self, run: Tensor, shape: Sequence[int]) -> nn.Parameter:
        """The frozen parameter of `shape` whose run on this rank is `run`, made by `allocate`."""


class Unsharded:
    """One process that keeps every parameter whole on its device."""

    rank, world = 0, 1

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def gather(self, mine: Tensor) -> Tensor:
        return mine

    def keep(self, run: Tensor, shape: Sequence[int]) -> nn.Parameter:
        return nn.Parameter(run.view(*shape), requires_grad=False)


def shard_range(numel: int, rank: int, world: int) -> tuple[int, int]:
    """First element and end of a rank's run of a flat parameter with `numel` elements."""
    length = -(-numel // world)
    return min(rank * length, numel), min((rank + 1) * length, numel)
