"""Adapter parameters that ZeRO-3 stores and our own collectives gather: what a rank holds of them, and how."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class ExpertGroups:
    """Process groups of a placement (trainer.distributed.expert_groups makes them).

    parallel: the n ranks that share a layer's experts out. replicas: the ranks that own the same experts as this one.
    replicate: each replica keeps its experts whole; else they are partitioned over the replicas.
    """

    parallel: dist.ProcessGroup
    replicas: dist.ProcessGroup
    replicate: bool

    @property
    def size(self) -> int:
        return self.parallel.size()

    @property
    def partitions(self) -> int:
        """Ranks over which one owner's part is cut."""
        return 1 if self.replicate else self.replicas.size()


class ExpertShard(nn.Module):
    """Stands where an adapter's parameter stood, and holds what of it this rank learns, `own`.

    Of a parameter by expert, [k, ...] or [k r_B, ...], that is its run of the first dimension; of one that all
    experts share it is the whole. It has no forward, so ZeRO-3's hooks, which gather what a module's forward needs,
    leave it alone.
    """

    def __init__(self, whole: nn.Parameter, groups: ExpertGroups, by_expert: bool) -> None:
        super().__init__()
        self.shape, self.groups, self.by_expert = whole.shape, groups, by_expert
        runs = whole.detach().chunk(groups.size) if by_expert else [whole.detach()]
        self.own = nn.Parameter(runs[groups.parallel.rank() if by_expert else 0].clone())
        self.own_shape, self.own_numel = self.own.shape, self.own.numel()

    def hide(self) -> None:
        """Gives the parameter its shape back, without memory, where ZeRO-3 has emptied it: autograd reads the shape."""
        if self.own.shape != self.own_shape:
            self.own.data = self.own.data.new_empty(1).expand(self.own_shape)

    def partition(self, device: torch.device) -> Tensor:
        """What this rank stores of `own`, flat, in the compute dtype."""
        return self.own.ds_tensor.to(device, non_blocking=True)

    def of_own(self, flat: Tensor) -> Tensor:
        """`own` from its partitions one after the other; ZeRO-3 pads the last."""
        return flat[: self.own_numel].view(self.own_shape)

    def merge(self, own: Tensor) -> Tensor:
        """The whole from what each owner has; every rank of the group takes part."""
        if not self.by_expert:
            return own
        whole = own.new_empty(self.shape)
        dist.all_gather_into_tensor(whole, own.contiguous(), group=self.groups.parallel)
        return whole


class Gather:
    """The parameters of one decoder layer's adapters on their way to this rank.

    travel: for each of them, whether other owners' parts are wanted too. What is shared is gathered from all ranks, a
    rank's own experts from its replicas, where they are cut at all, and the whole then from the owners: `advance`
    goes from the one to the other. Ranks create, advance and finish their gathers in the same order.
    """

    def __init__(self, held: Sequence[ExpertShard], travel: Sequence[bool], device: torch.device) -> None:
        self._held, self._travel = held, travel
        self._groups = held[0].groups
        self._shared = _Arrival([h.partition(device) for h in held if not h.by_expert], dist.group.WORLD)
        by_expert = [h.partition(device) for h in held if h.by_expert]
        self._own: list[Tensor] | None = None
        self._cut = _Arrival(by_expert, self._groups.replicas) if self._groups.partitions > 1 else None
        if self._cut is None:
            self._start_whole(by_expert)

    def advance(self) -> None:
        """Starts the second gather, once the first is there."""
        if self._own is None:
            self._start_whole(self._cut.wait())

    def wait(self) -> list[Tensor]:
        """Values: whole where they are shared or travel, else this rank's own experts."""
        self.advance()
        shared, own, whole = iter(self._shared.wait()), iter(self._own), iter(self._whole.wait())
        values = []
        for held, travels in zip(self._held, self._travel, strict=True):
            mine = next(own) if held.by_expert else held.of_own(next(shared))
            values.append(next(whole).view(held.shape) if travels else mine)
        return values

    def _start_whole(self, flat: Sequence[Tensor]) -> None:
        by_expert = [(held, travels) for held, travels in zip(self._held, self._travel, strict=True) if held.by_expert]
        self._own = [held.of_own(values) for (held, _), values in zip(by_expert, flat, strict=True)]
        travelling = [own.view(-1) for own, (_, travels) in zip(self._own, by_expert, strict=True) if travels]
        self._whole = _Arrival(travelling, self._groups.parallel)


class _Arrival:
    """Flat tensors of every rank of a group, gathered at once; none is nothing to wait for."""

    def __init__(self, mine: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._lengths = [tensor.numel() for tensor in mine]
        self._work = None
        if mine:
            packed = torch.cat(mine) if len(mine) > 1 else mine[0]
            self._everyone = packed.new_empty(group.size(), packed.numel())
            self._work = dist.all_gather_into_tensor(self._everyone.view(-1), packed, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """Each tensor's pieces joined in the order of ranks."""
        if self._work is None:
            return []
        self._work.wait()
        return [pieces.reshape(-1) for pieces in self._everyone.split(self._lengths, dim=1)]


def merge_own(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name, those of a rank's own experts merged, all under their names without placement.

    Every rank takes part. Without placement it gives back what it was given.
    """
    placed = {
        f"{name}.own": (name, module) for name, module in model.named_modules() if isinstance(module, ExpertShard)
    }
    merged = {}
    for name, value in values.items():
        if name in placed:
            name, module = placed[name]
            value = module.merge(value)
        merged[name] = value
    return merged


def experts_elsewhere(model: nn.Module) -> int:
    """Elements of the experts that the other ranks of a group own."""
    return sum(m.shape.numel() - m.own_numel for m in model.modules() if isinstance(m, ExpertShard))
