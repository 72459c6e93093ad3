"""The highest moment before the first step, when DeepSpeed takes the adapted model over or experts are calibrated."""

from collections.abc import Sequence

from trainer.distributed.autotune import MANY
from trainer.estimate.rank_model import RankModel
from trainer.estimate.resident import MemoryUse
from trainer.recipe import ExpertsConfig

# What is there only once the first step begins.
NOT_YET = ("gradients", "optimizer moments", "checkpoint copy", "reduce bucket", "kept whole (persistence)")
LEARNING = ("adapter", "master copy")


def loading(held: Sequence[MemoryUse], rank_model: RankModel, experts: ExpertsConfig) -> MemoryUse:
    """Beside the base: the adapter whole, as each rank makes it; then its shard, flattened once more beside its fp32
    copy; then the shard, that copy, and what calibration needs.
    """
    stays = [row for row in held if row.name not in (*NOT_YET, *LEARNING)]
    shard, master = (next(row for row in held if row.name == name) for name in LEARNING)
    whole = sum(p.numel() * p.element_size() for p in rank_model.model.parameters() if p.requires_grad)
    work = max(shard.device, autotune_bytes(rank_model, experts))
    device = max(whole, shard.device + master.device + work)
    host = sum(row.host for row in (*stays, shard, master))
    return MemoryUse("while loading", sum(row.device for row in stays) + device, host)


def autotune_bytes(rank_model: RankModel, experts: ExpertsConfig) -> int:
    """Dispatch `auto` exchanges outputs of MANY tokens: one rank's, all ranks' three times (TokenDispatcher.add)."""
    if rank_model.placement is None or experts.dispatch != "auto":
        return 0
    widest = max(held.shape[-1] for layer in rank_model.placement.layers for held in layer.experts)
    return (1 + 3 * experts.parallel_size) * MANY * widest * rank_model.dtype.itemsize
