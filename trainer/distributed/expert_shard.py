"""Adapter parameters that ZeRO-3 stores and our own collectives gather: what a rank holds of them, and how."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.distributed.adapter_groups import AdapterGroups
from trainer.distributed.deepspeed_internals import local_shard


class ExpertShard(nn.Module):
    """Takes the place of one adapter parameter and holds `own`, the part of it that this rank learns.

    For a parameter with one slice per expert, [k, ...] or [k r_B, ...], `own` is this rank's run of the first
    dimension; for a parameter that all experts share it is the whole. The module has no forward, so ZeRO-3's hooks,
    which gather what a module's forward needs, leave it alone.
    """

    def __init__(self, whole: nn.Parameter, groups: AdapterGroups, by_expert: bool) -> None:
        super().__init__()
        self.shape, self.groups, self.by_expert = whole.shape, groups, by_expert
        runs = whole.detach().chunk(groups.size) if by_expert else [whole.detach()]
        own = nn.Parameter(runs[groups.parallel.rank() if by_expert else 0].clone())
        self.register_parameter("own", own)
        self._own = (own,)  # a tuple hides it from nn.Module
        self.own_shape, self.own_numel = own.shape, own.numel()

    @property
    def learned(self) -> nn.Parameter:
        """`own`, looked up past nn.Module: during a forward ZeRO-3 gathers each parameter that is asked for by name,
        and again in every later forward."""
        return self._own[0]

    @property
    def own_start(self) -> int:
        """The place of `own`'s first element in the flattened whole."""
        return self.groups.parallel.rank() * self.own_numel if self.by_expert else 0

    def restore_shape(self) -> None:
        """Gives `own` its shape back, without memory, where ZeRO-3 has emptied it: autograd reads the shape."""
        own = self.learned
        if own.shape != self.own_shape:
            own.data = own.data.new_empty(1).expand(self.own_shape)

    def stored(self, device: torch.device) -> Tensor:
        """What this rank stores of `own`, flat, in the compute dtype."""
        return local_shard(self.learned).to(device, non_blocking=True)

    def own_from(self, flat: Tensor) -> Tensor:
        """`own` from its partitions, one after the other; ZeRO-3 pads the last."""
        return flat[: self.own_numel].view(self.own_shape)

    def merge(self, own: Tensor) -> Tensor:
        """The whole parameter from every owner's part. Collective: every rank of the group must call it."""
        if not self.by_expert:
            return own
        whole = own.new_empty(self.shape)
        dist.all_gather_into_tensor(whole, own.contiguous(), group=self.groups.parallel)
        return whole


class LayerGather:
    """Gathers the adapter parameters of one decoder layer, asynchronously.

    Collective: ranks create, advance and wait for their gathers in the same order. Shared parameters and a
    rank's own experts are gathered from the ranks among which they are cut; then the whole from the owners.
    `advance` goes from the second to the third. travel: for each shard, whether other owners' parts are wanted too.
    """

    def __init__(self, shards: Sequence[ExpertShard], travel: Sequence[bool], device: torch.device) -> None:
        self._shards, self._travel = shards, travel
        self._groups = shards[0].groups
        shared = [s.stored(device) for s in shards if not s.by_expert]
        self._shared = _AsyncGather(shared, self._groups.shared.among)
        by_expert = [s.stored(device) for s in shards if s.by_expert]
        self._own: list[Tensor] | None = None
        among = self._groups.experts.among
        self._cut = _AsyncGather(by_expert, among) if among.size() > 1 else None
        if self._cut is None:
            self._start_whole(by_expert)

    def advance(self) -> None:
        """Starts the gather from the owners, once that from the replicas has arrived."""
        if self._own is None:
            assert self._cut is not None
            self._start_whole(self._cut.wait())

    def wait(self) -> list[Tensor]:
        """Values by shard: whole where they are shared or travel, else this rank's own experts."""
        self.advance()
        assert self._own is not None
        shared, own, whole = iter(self._shared.wait()), iter(self._own), iter(self._whole.wait())
        values = []
        for shard, travels in zip(self._shards, self._travel, strict=True):
            mine = next(own) if shard.by_expert else shard.own_from(next(shared))
            values.append(next(whole).view(shard.shape) if travels else mine)
        return values

    def _start_whole(self, flat: Sequence[Tensor]) -> None:
        by_expert = [(s, travels) for s, travels in zip(self._shards, self._travel, strict=True) if s.by_expert]
        self._own = [shard.own_from(values) for (shard, _), values in zip(by_expert, flat, strict=True)]
        travelling = [own.view(-1) for own, (_, travels) in zip(self._own, by_expert, strict=True) if travels]
        self._whole = _AsyncGather(travelling, self._groups.parallel)


class _AsyncGather:
    """Flat tensors of every rank of a group, gathered in one collective; without tensors there is none."""

    def __init__(self, mine: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self._lengths = [tensor.numel() for tensor in mine]
        self._work: dist.Work | None = None
        if mine:
            packed = torch.cat(list(mine)) if len(mine) > 1 else mine[0]
            self._everyone = packed.new_empty(group.size(), packed.numel())
            self._work = dist.all_gather_into_tensor(self._everyone.view(-1), packed, group=group, async_op=True)

    def wait(self) -> list[Tensor]:
        """Each tensor's parts, joined in the order of ranks."""
        if self._work is None:
            return []
        self._work.wait()
        return [parts.reshape(-1) for parts in self._everyone.split(self._lengths, dim=1)]


def expert_shards(model: nn.Module) -> dict[str, tuple[str, ExpertShard]]:
    """By the name of each shard's `own`: the name that the parameter has in adapters, and the shard."""
    return {f"{name}.own": (name, m) for name, m in model.named_modules() if isinstance(m, ExpertShard)}


def merge_shards(model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name with every rank's own experts merged, all under the names that they have in adapters.

    Collective: every rank must call it.
    """
    placed = expert_shards(model)
    merged = {}
    for name, value in values.items():
        if name in placed:
            name, shard = placed[name]
            value = shard.merge(value)
        merged[name] = value
    return merged


def experts_elsewhere(model: nn.Module) -> int:
    """Elements of the experts that the other ranks of a group own."""
    return sum(m.shape.numel() - m.own_numel for m in model.modules() if isinstance(m, ExpertShard))
