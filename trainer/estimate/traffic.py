"""Bytes that ranks send in one optimizer step, by purpose: a model of what is moved, independent of the transport.

Gathering a parameter of b bytes from N ranks sends (N - 1) / N of b per rank on average: each rank's shard goes to
every other rank. So does the reduce-scatter of a gradient. N is base.shard_group for the base, adapter.shard_group for
what learns; where that makes copies, gradients are reduced over a group twice and over the copies once
(trainer.distributed.accumulation). ZeRO-3 gathers each parameter in forward and in backward of every micro-batch (the
frozen embedding in forward only); a model of no more than stage3_max_live_parameters elements once, from the second
step on (trainer.estimate.gathered), but adapters in every pass where they are gathered by decoder layer. Activation
checkpointing repeats a layer's forward within its backward, on parameters that are already there. Gradients are reduced
once a step, in the compute dtype; those of placed experts go to the owners after every micro-batch.

Gradients are exact, but for gloo, whose reduce-scatter sends as much as an all-reduce. Gathers are an upper bound, by a
layer or two: what precedes the first adapter has no backward, and what forward uses last is still there when backward
begins.

Collectives are taken to be rings through ranks in their order: of a group that spans nodes one connection leads out of
each. Gradients of experts go from every rank to every other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from trainer.distributed.adapter_groups import Division
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.estimate.gathered import is_gathered_once
from trainer.estimate.rank_model import RankModel
from trainer.estimate.zero_settings import ZeroSettings


@dataclass(frozen=True)
class Flow:
    """What each rank sends in a step for one purpose, in groups of `size` ranks that are `stride` apart.

    sent: bytes per rank. ring: each rank sends to the next one only; else as much to each of the others. overlaps: with
    arithmetic.
    """

    purpose: str
    sent: Fraction
    size: int
    stride: int = 1
    ring: bool = True
    overlaps: bool = True

    def out_of_node(self, ranks_per_node: int) -> Fraction:
        """Bytes that leave each node, for the ranks of all its groups."""
        here = self._here(ranks_per_node)
        if here >= self.size:
            return Fraction(0)
        if self.ring:
            return self.sent * min(self.stride, ranks_per_node)
        return self.sent * ranks_per_node * Fraction(self.size - here, self.size - 1)

    def inside_node(self, ranks_per_node: int) -> Fraction:
        """Bytes that a rank sends to others of its node: the most that one does."""
        here = min(self._here(ranks_per_node), self.size)
        if here == 1:
            return Fraction(0)
        return self.sent if self.ring else self.sent * Fraction(here - 1, self.size - 1)

    def _here(self, ranks_per_node: int) -> int:
        """Ranks of one group on a node."""
        return max(1, ranks_per_node // self.stride)


def flows(rank_model: RankModel, zero: ZeroSettings, world_size: int, accumulation: int) -> list[Flow]:
    """The traffic of placed experts depends on the dispatch; this is that of dispatch `weights`."""
    trained = rank_model.trained
    if zero.stage != 3:
        return _replicated(trained, zero, world_size, accumulation)
    shared = [p for p in trained if p not in rank_model.by_expert]
    once = rank_model.expert_parallel is None and is_gathered_once(rank_model, zero)
    passes = (1 if once else 2) * accumulation
    division, size = rank_model.groups.shared, _bytes(shared)
    at_end = accumulation > 1 or division.copies is not None or not zero.overlap
    found = [
        _ring("gathers of the base", _base_gathers(rank_model, zero, accumulation), zero.shard_group),
        _ring("gathers of the adapter", passes * size, division.among.size()),
        *_reduced("gradients", size, division, stride=1, apart=division.among.size(), overlaps=not at_end),
    ]
    by_layer = rank_model.expert_parallel
    return found if by_layer is None else [*found, *_placed(by_layer, accumulation)]


def sent_bytes(flows: Iterable[Flow]) -> dict[str, int]:
    """{purpose: bytes per rank}"""
    return _by_purpose((flow.purpose, flow.sent) for flow in flows)


def bytes_between_nodes(flows: Iterable[Flow], ranks_per_node: int) -> dict[str, int]:
    """{purpose: bytes that leave each node}"""
    return _by_purpose((flow.purpose, flow.out_of_node(ranks_per_node)) for flow in flows)


def _by_purpose(sizes: Iterable[tuple[str, Fraction]]) -> dict[str, int]:
    found: dict[str, Fraction] = {}
    for purpose, size in sizes:
        found[purpose] = found.get(purpose, Fraction(0)) + size
    return {purpose: int(size) for purpose, size in found.items()}


def _base_gathers(rank_model: RankModel, zero: ZeroSettings, accumulation: int) -> int:
    """Bytes of the base that are put together in a step.

    The embedding needs no backward; a tied one is gathered for the head as well.
    """
    frozen = [p for p in rank_model.model.parameters() if not p.requires_grad and p.numel() > zero.persistence]
    if is_gathered_once(rank_model, zero):
        return accumulation * _bytes(frozen)
    embedding = rank_model.embedding
    extra = 0 if embedding.numel() <= zero.persistence else 1 if embedding is rank_model.head.weight else -1
    return accumulation * (2 * _bytes(frozen) + extra * _bytes([embedding]))


def _replicated(trained: list[nn.Parameter], zero: ZeroSettings, world_size: int, accumulation: int) -> list[Flow]:
    """Stage 0 all-reduces once per step; stages 1 and 2 reduce, then gather the updated parameters."""
    size, during = _bytes(trained), zero.stage > 0 and zero.overlap and accumulation == 1
    return [
        _ring("gradients", size if zero.stage else 2 * size, world_size, overlaps=during),
        _ring("gathers of the stepped adapter", size if zero.stage else 0, world_size, overlaps=False),
    ]


def _placed(expert_parallel: ExpertParallel, accumulation: int) -> list[Flow]:
    """Every pass gathers all experts, and every backward sends their gradients to the owners."""
    groups, own = expert_parallel.groups, _bytes(expert_parallel.by_expert)
    if not own:
        return []
    owners, among = groups.size, groups.experts.among.size()
    apart = owners * among  # the same part in the next copy
    gathers, gradients = "gathers of placed experts", "gradients of placed experts"
    to_owners = Fraction((owners - 1) * own)
    return [
        _ring(gathers, 2 * accumulation * own, among, owners),
        Flow(gathers, 2 * accumulation * to_owners, owners),
        Flow(gradients, accumulation * to_owners, owners, ring=False, overlaps=False),
        *_reduced(gradients, own, groups.experts, owners, apart, overlaps=False),
    ]


def _reduced(purpose: str, size: int, division: Division, stride: int, apart: int, overlaps: bool) -> list[Flow]:
    """A step's reduction of gradients of `size` bytes. stride, apart: of ranks with parts of a copy, and of copies."""
    ranks = division.among.size()
    within = _ring(purpose, size, ranks, stride, overlaps)
    if division.copies is None:
        return [within]
    copies = division.copies.size()
    to_owners = Flow(purpose, within.sent, ranks, stride, ring=False, overlaps=overlaps)
    over_copies = Flow(purpose, 2 * _share(Fraction(size, ranks), copies), copies, apart, overlaps=overlaps)
    return [within, to_owners, over_copies]


def _ring(purpose: str, size: int, ranks: int, stride: int = 1, overlaps: bool = True) -> Flow:
    """A gather or a reduce-scatter of so many bytes."""
    return Flow(purpose, _share(size, ranks), ranks, stride, overlaps=overlaps)


def _share(size: int | Fraction, ranks: int) -> Fraction:
    return Fraction(size) * (ranks - 1) / ranks


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
