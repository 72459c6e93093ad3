"""Bytes that each rank sends in one optimizer step, by purpose: a model of what is moved, independent of the transport.

Gathering a parameter of b bytes from N ranks sends (N - 1) / N of b per rank on average: each rank's shard goes to
every other rank. So does the reduce-scatter of a gradient. N is base.shard_group for the base, adapter.shard_group for
what learns; where that makes copies, gradients are reduced over a group twice and over the copies once
(trainer.distributed.accumulation). ZeRO-3 gathers each parameter in forward and in backward of every micro-batch (the
frozen embedding in forward only).
Activation checkpointing repeats a layer's forward within its backward, on parameters that are already there. Gradients
are reduced once a step, in the compute dtype; those of placed experts go to the owners after every micro-batch.

Gradients are exact. Gathers are an upper bound, by a layer or two: what precedes the first adapter has no backward, and
what forward uses last is still there when backward begins. A model of fewer elements than stage3_max_live_parameters is
gathered about once per micro-batch from the second step on (trainer.estimate.gathered).
"""

from collections.abc import Iterable
from fractions import Fraction

from torch import nn

from trainer.distributed.adapter_groups import Division
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.estimate.rank_model import RankModel
from trainer.estimate.zero_settings import ZeroSettings


def sent_bytes(rank_model: RankModel, zero: ZeroSettings, world_size: int, accumulation: int) -> dict[str, int]:
    """{purpose: bytes}. The traffic of placed experts depends on the dispatch; this is that of dispatch `weights`."""
    trained = rank_model.trained
    if zero.stage != 3:
        return _replicated(trained, zero, world_size)
    frozen = [p for p in rank_model.model.parameters() if not p.requires_grad]
    passes = 2 * accumulation
    embedding = _embedding_gathers(rank_model, accumulation, zero)
    shared = [p for p in trained if p not in rank_model.by_expert]
    sent = {
        "gathers of the base": _share(
            passes * _bytes(p for p in frozen if p.numel() > zero.persistence) + embedding, zero.shard_group
        ),
        "gathers of the adapter": passes * _share(_bytes(shared), rank_model.groups.shared.among.size()),
        "gradients": _reduced(_bytes(shared), rank_model.groups.shared),
    }
    if rank_model.placement is not None:
        sent |= _placed(rank_model.placement, accumulation)
    return {name: int(size) for name, size in sent.items()}


def _embedding_gathers(rank_model: RankModel, accumulation: int, zero: ZeroSettings) -> int:
    """Bytes by which the embedding differs from two gathers per micro-batch.

    Its backward needs none; a tied embedding is gathered for the head as well.
    """
    embedding = rank_model.embedding
    if embedding.numel() <= zero.persistence:
        return 0
    return accumulation * _bytes([embedding]) * (1 if embedding is rank_model.head.weight else -1)


def _replicated(trained: list[nn.Parameter], zero: ZeroSettings, world_size: int) -> dict[str, int]:
    """Stage 0 all-reduces once per step; stages 1 and 2 reduce, then gather the updated parameters."""
    part = _share(_bytes(trained), world_size)
    reduced = part if zero.stage else 2 * part
    return {"gradients": int(reduced), "gathers of the stepped adapter": int(part if zero.stage else 0)}


def _placed(placement: ExpertParallel, accumulation: int) -> dict[str, Fraction]:
    """Every pass gathers all experts, and every backward sends their gradients to the owners."""
    groups, own = placement.groups, _bytes(placement.by_expert)
    among_replicas, among_owners = _share(own, groups.experts.among.size()), (groups.size - 1) * own
    return {
        "gathers of placed experts": 2 * accumulation * (among_replicas + among_owners),
        "gradients of placed experts": accumulation * among_owners + _reduced(own, groups.experts),
    }


def _reduced(size: int, division: Division) -> Fraction:
    """Bytes per rank that a step sends to reduce gradients of `size` bytes where there may be copies."""
    ranks = division.among.size()
    within = _share(size, ranks)
    if division.copies is None:
        return within
    return 2 * within + 2 * _share(Fraction(size, ranks), division.copies.size())


def _share(size: int | Fraction, ranks: int) -> Fraction:
    return Fraction(size) * (ranks - 1) / ranks


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)
